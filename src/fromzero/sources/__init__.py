"""Where things come from: a source as people write it in, a local path out. Knows no tensor and no table."""

from fromzero.sources.archives import check_zip, is_zip, read_member
from fromzero.sources.cache import cache_folder, digest_of, locked, write_whole
from fromzero.sources.hub import fetch_hub
from fromzero.sources.pypi import PypiSource, fetch

__all__ = ["PypiSource", "cache_folder", "check_zip", "digest_of", "fetch", "fetch_hub", "is_zip", "locked", "read_member", "write_whole"]
