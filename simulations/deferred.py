"""Parts of torch that load when they are used, not with `import torch`.

Half of torch's 900 modules are for exporting and quantizing models, for reading data, for shapes
without data (`torch._meta_registrations`, the largest: "meta" tensors). A simulation uses none of
them, but a task's model may. So `import_torch` leaves those in `_PUT_OFF` empty, and all of them
are filled, in their order, before the first of

- a look for a name in one of them;
- an import of a part of torch that is not there yet: every one that needs them is not;
- a meta tensor, which only the operators in `_MAKERS` make out of nothing;
- a mode that makes its own past them, which compiling and exporting begin with.

For versions of torch on which `tests/test_simulations_startup.py` holds this against an ordinary
start; in others, and where torch is imported already, nothing changes.
"""

import functools
import importlib
import importlib.metadata
import inspect
import operator
import sys
import threading
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_PROVEN = "2.13."
_KERNELS = "torch._meta_registrations"
_FIRST = "torch._decomp"
_PUT_OFF = (
    "torch.utils.data",
    "torch.nn.attention",
    "torch.distributions",
    "torch.optim",
    "torch.profiler",
    "torch.ao",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.quantization",
    "torch.masked",
    "torch.export",
    _KERNELS,
)
_WHEN_SHOWN = "torch._subclasses.schema_check_mode"  # imported to show a tensor, needs nothing
_MAKERS = ("empty.memory_format", "empty_strided", "_efficientzerotensor")
_MAKERS_ONLY_THERE = ("tril_indices", "triu_indices", "_make_dep_token")
_MODES = (
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("torch._subclasses.functional_tensor", "FunctionalTensorMode"),
)


def import_torch() -> None:
    """Import torch without what a simulation does not use, which is loaded once it is used."""
    finder = _Finder()
    if "torch" not in sys.modules and _is_proven():
        sys.meta_path.insert(0, finder)
    importlib.import_module("torch")
    importlib.import_module(_WHEN_SHOWN)
    finder.imported()


def _is_proven() -> bool:
    try:
        return importlib.metadata.version("torch").startswith(_PROVEN)
    except importlib.metadata.PackageNotFoundError:
        return False


class _Finder(MetaPathFinder):
    """Finds what is put off as empty modules, and fills them before whatever needs them."""

    def __init__(self) -> None:
        self._importing = True
        self._empty: dict[str, Loader] = {}
        self._filled_by: int | None = None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        """As of any finder."""
        if not fullname.startswith("torch.") or self._filled_by == threading.get_ident():
            return None
        if not self._importing:
            return self._filled(fullname) if self._empty or self._filled_by else None
        if any(fullname.startswith(f"{name}.") for name in self._empty):
            return self._filled(fullname)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None and spec.origin is not None:
            # Some ask `inspect` where they are, which would look through all modules for them.
            inspect.modulesbyfile[spec.origin] = fullname
            if fullname in _PUT_OFF:
                spec.loader = _Leave(self, spec.loader)
        return spec

    def imported(self) -> None:
        """Put nothing off from now on."""
        self._importing = False

    def _filled(self, fullname: str) -> ModuleSpec | None:
        if fullname == _FIRST:
            self._fill()
        else:
            _load()
        return _ready(sys.modules[fullname]) if fullname in sys.modules else None

    def leave(self, module: types.ModuleType, loader: Loader) -> None:
        """Take note of an empty module, and of all that may need it."""
        self._empty[module.__name__] = loader
        vars(module)["__getattr__"] = functools.partial(self._name_of, module)
        vars(module)["__dir__"] = functools.partial(_names_of, module)
        if module.__name__ == _KERNELS:
            _set_traps()

    def _fill(self) -> None:
        """Only under the lock of the import of `_FIRST`, so that other threads wait."""
        self._importing, self._filled_by = False, threading.get_ident()
        torch: Any = sys.modules["torch"]
        for place in (torch, getattr(torch, "ops", torch)):
            later = [n for n, value in vars(place).items() if isinstance(value, _Later)]
            for name in later:
                delattr(place, name)
        modules = [sys.modules[name] for name in self._empty]
        for module in modules:
            self._fill_one(module)
        for module in modules:
            if isinstance(vars(module).get("__getattr__"), functools.partial):
                del vars(module)["__getattr__"]
        self._filled_by = None

    def _fill_one(self, module: types.ModuleType) -> None:
        loader = self._empty.pop(module.__name__, None)
        if loader is not None:
            vars(module).pop("__dir__")
            loader.exec_module(module)

    def _name_of(self, module: types.ModuleType, name: str) -> Any:
        """Found by whoever fills what is put off if it is there, by everybody else when all is."""
        if name.startswith("__") and name != "__all__":  # asked by who looks through all modules
            raise AttributeError(name)
        if self._filled_by != threading.get_ident():
            _load()
        elif module.__name__ in self._empty:
            self._fill_one(module)
        else:
            raise AttributeError(name)
        return getattr(module, name)


def _load() -> None:
    importlib.import_module(_FIRST)


class _Leave(Loader):
    """Leaves a module empty."""

    def __init__(self, finder: _Finder, loader: Loader) -> None:
        self._finder, self._loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Put off."""
        self._finder.leave(module, self._loader)


def _ready(module: types.ModuleType) -> ModuleSpec:
    """How to find a module that was loaded while it was looked for."""
    spec = ModuleSpec(module.__name__, _Ready(module))
    module.__spec__ = spec  # importlib would take that of a module which is there, and run it again
    return spec


class _Ready(Loader):
    """Hands out a module as it is."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:  # noqa: ARG002 (the protocol's)
        """The module."""
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is left to do."""
        module.__spec__ = self._spec


def _names_of(module: types.ModuleType) -> list[str]:
    _load()
    return dir(module)


class _Later:
    """Stands for a module or namespace of torch, by its path, until somebody looks into it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        """As of what it stands for."""
        _load()
        return getattr(operator.attrgetter(self._path)(sys.modules["torch"]), name)


def _set_traps() -> None:
    """Load before whatever needs it, from now on."""
    torch: Any = importlib.import_module("torch")
    eager_transforms: Any = importlib.import_module("torch._functorch.eager_transforms")
    _finish_generators()
    for module, name in _MODES:
        mode = getattr(importlib.import_module(module), name)
        mode.__init__ = _after_loading(mode.__init__)
    torch.func.functionalize = _after_loading(torch.func.functionalize)
    eager_transforms.functionalize = torch.func.functionalize
    for name in ("_decomp", "_prims", "_refs"):
        setattr(torch, name, _Later(name))
    for name in ("prims", "rngprims", "debugprims"):
        setattr(torch.ops, name, _Later(f"ops.{name}"))
    library = torch.library.Library("aten", "IMPL", "Meta")
    _LIBRARIES.append(library)  # what is registered lives as long as it does
    for name in _MAKERS:
        kernel = torch.library.get_kernel(f"aten::{name}", "Meta")
        library.impl(name, _after_loading(kernel.call_boxed), with_keyset=True)
    for name in _MAKERS_ONLY_THERE:
        library.impl(name, _after_loading(getattr(torch.ops.aten, name)))


_LIBRARIES: list[Any] = []


def _finish_generators() -> None:
    """What `torch._prims.rng_prims` does, too, without which there is no `torch.Generator`."""
    torch: Any = importlib.import_module("torch")
    opaque_object: Any = importlib.import_module("torch._library.opaque_object")
    base: Any = importlib.import_module("torch._opaque_base")
    vars(torch._C)["_set_generator_metaclass"](base.OpaqueBaseMeta)  # noqa: SLF001 (no other name)
    register = opaque_object.register_opaque_type
    register(
        torch.Generator,
        typ="reference",
        guard_fn=lambda generator: [generator.device],
        members=dict.fromkeys(("device", "__eq__", "__ne__"), opaque_object.MemberType.USE_REAL),
    )

    def register_others(kind: Any, **how: Any) -> None:
        if kind is not torch.Generator:
            register(kind, **how)

    opaque_object.register_opaque_type = functools.update_wrapper(register_others, register)


def _after_loading(act: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        _load()
        return act(*args, **kwargs)

    return functools.update_wrapper(loaded, act)
