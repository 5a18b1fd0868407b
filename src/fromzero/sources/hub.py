"""`hf:owner/name[/FILE][@REVISION]`, or `ms:` for ModelScope, in, a local folder or file out. No code is ever brought.

The one place that meets the hubs' own libraries, which know the endpoint, the token, the cache and what offline means
(HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are read by huggingface_hub itself).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from fromzero.errors import MissingExtra, SourceError

_FORM = re.compile(r"(?P<hub>hf|ms):(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?")

# What describes a model and how it is used; EXTRAS are the files that only some kinds of model have.
EXTRAS = ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "preprocessor_config.json")
_CARDS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "adapter_config.json", *EXTRAS),
)
# What weights are called: the second only where there are none of the first. A GGUF file is named by who wants it:
# it is often one of twenty quantisations with gigabytes each.
_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
)


def fetch_hub(source: str) -> tuple[Path, str]:
    """The local folder of a model, or the one file of it that was named (a glob will do), and the source with its revision.

    raises: SourceError where the hub, the model, its revision or the file is not to be had; MissingExtra without modelscope
    """
    match = _FORM.fullmatch(source)
    if match is None or {"..", "/"} & set(Path(match["file"] or "").parts):
        raise SourceError(f"'{source}' is no model of a hub", mend="write hf:owner/name, hf:owner/name@revision or hf:owner/name/FILE.gguf")
    hub, name, file, revision = match.groups()
    for globs in ((file,),) if file else _WEIGHTS:
        folder = (_from_modelscope if hub == "ms" else _from_huggingface)(name, revision, [*_CARDS, *globs])
        found = [path for glob in globs for path in folder.glob(glob)]
        resolved = folder.name if hub == "hf" else revision or "master"  # the Hugging Face cache calls a folder by its commit
        if found and not file:
            return folder, f"{hub}:{name}@{resolved}"
        if len(found) == 1:
            return found[0], f"{hub}:{name}/{found[0].relative_to(folder).as_posix()}@{resolved}"
    what = f"{len(found)} files that match '{file}'" if file else "no model.safetensors and no pytorch_model.bin"
    raise SourceError(f"{hub}:{name} has {what}", mend=f"one file is named as {hub}:{name}/FILE.gguf")


def _from_huggingface(name: str, revision: str | None, globs: Sequence[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(globs)))
    except Exception as error:  # the hub's own, httpx's, and the disk's
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", 0)
        what, mend = f"could not be fetched ({_said(error)})", "try again; HF_ENDPOINT sets a mirror"
        if isinstance(error, errors.GatedRepoError):
            what, mend = "is gated", f"accept its terms at https://huggingface.co/{name}, and set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            what, mend = "does not exist, or is private", "check the name; for a private one set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            what, mend = f"has no revision '{revision}'", "name a branch, a tag or a commit"
        elif status in (401, 403):
            what, mend = f"may not be read (HTTP {status})", "set HF_TOKEN to a token that may"
        elif isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            what, mend = "is not whole in the cache, and HF_HUB_OFFLINE is set", "unset it to fetch"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = f"answered with HTTP {status}" if status else "cannot be reached"
            what, mend = f"is not whole in the cache, and the hub {reason}", "check the network; HF_ENDPOINT sets a mirror"
        raise SourceError(f"hf:{name} {what}", mend=mend) from None


def _from_modelscope(name: str, revision: str | None, globs: Sequence[str]) -> Path:
    try:
        modelscope = importlib.import_module("modelscope")
    except ImportError:
        raise MissingExtra("ms: sources need the package modelscope", mend="pip install modelscope") from None
    try:
        return Path(modelscope.snapshot_download(name, revision=revision, allow_patterns=list(globs)))
    except Exception as error:  # requests', and modelscope's own, which moved between its versions
        raise SourceError(f"ms:{name} could not be fetched ({_said(error)})", mend="check the name, the revision and the network") from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
