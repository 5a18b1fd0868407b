"""Serve: a model in, answers over HTTP out. Importing this needs the packages of the extra `serve`."""

from importlib.util import find_spec

from fromzero.errors import MissingExtra

for _name in ("starlette", "uvicorn"):
    if find_spec(_name) is None:
        _mend = "pip install 'fromzero[serve]'"
        raise MissingExtra(f"the package {_name} is not installed", why="fromzero serve speaks HTTP with it", mend=_mend)
