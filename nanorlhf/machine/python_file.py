"""A Python file, a user's or one of this clone's scripts, loaded as `python FILE` would load it."""

import importlib.util
import sys
import traceback
from pathlib import Path

from nanorlhf.config import die, reason

ROOT = Path(__file__).parents[2]


def load_function(spec, flag):
    """`path.py:name` -> the function of that name. Exits 2, and says which functions the file
    defines, where there is none."""
    path, name = (spec, "") if spec.endswith(".py") else spec.rpartition(":")[::2]
    if not Path(path).is_file() or Path(path).suffix != ".py":
        die(f"{flag} {spec}: {path or spec} is not a Python file")
    try:
        module = load_module(Path(path).resolve())
    except (Exception, SystemExit) as error:
        die(f"{flag} {spec}: {raised(error)}")
    function = getattr(module, name or "no name", None)
    if callable(function):
        return function
    own = [n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__]
    fault = f"no function {name!r}" if name else f"which function? {flag} {path}:NAME"
    die(f"{flag} {spec}: {fault}; it defines {', '.join(own) or 'none'}")


def load_script(name):
    """The script NAME.py beside the package, whose functions `bench` and `inspect` run. Exits 2
    where the package was installed without it."""
    path = ROOT / f"{name}.py"
    if not path.is_file():
        die(f"{path}: not there; this needs a clone of the repository")
    return load_module(path)


def load_module(path):
    """Neighbours can be imported, dataclasses and pickle find the module by its name, and a file
    that is named twice is loaded once."""
    name, folder = path.stem, str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"{name} in {folder}"  # there is a module of Python's, or of another folder
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # else a second call would find half a module
        raise
    return module


def raised(error):
    """What the user's code raised, and where, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {reason(error)} (at {last.filename}:{last.lineno})"
