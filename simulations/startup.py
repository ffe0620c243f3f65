"""A quicker start of the command line: torch's Python kernels for `meta` tensors load when used.

A third of `import torch` is `torch._meta_registrations`: shapes of results of tensors without data,
for `torch.compile`, `torch.export` and `device="meta"`. A simulation uses none of them, but a
task's model may. So the module is loaded before the first of

- a meta tensor, which only the operators in `_MAKERS` make out of nothing;
- a mode that makes its own past them, which compiling and exporting begin with;
- an import of what comes with it (`_COMES_WITH`), or a look into it or its operators.

For versions of torch on which `tests/test_simulations_startup.py` holds this against an ordinary
start; in others, and where torch is imported already, nothing changes.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import operator
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_PROVEN = "2.13."
_DEFERRED = "torch._meta_registrations"
_FIRST = "torch._decomp"
_COMES_WITH = (
    _FIRST,
    "torch._prims",
    "torch._prims_common.wrappers",
    "torch._refs",
    "torch.testing._internal.common_dtype",
    "torch.utils._content_store",
)
_MAKERS = ("empty.memory_format", "empty_strided", "_efficientzerotensor")
_MAKERS_ONLY_THERE = ("tril_indices", "triu_indices", "_make_dep_token")
_MODES = (
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("torch._subclasses.functional_tensor", "FunctionalTensorMode"),
)


def defer_meta_kernels() -> None:
    """Let the `import torch` that follows leave out its kernels for meta tensors until needed.

    For a process that ends with the command: it changes torch for all who share the process.
    """
    if "torch" in sys.modules or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if version.startswith(_PROVEN):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the deferred module as an empty one, and fills it before what comes with it."""

    def __init__(self) -> None:
        self._loader: Loader | None = None
        self._empty: types.ModuleType | None = None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        """As of any finder."""
        if fullname == _DEFERRED:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None:
                self._loader, spec.loader = spec.loader, _Leave(self)
            return spec
        if self._empty is None or fullname not in _COMES_WITH:
            return None
        if fullname == _FIRST:
            self._fill()
        else:
            _load()
        return _ready(sys.modules[fullname]) if fullname in sys.modules else None

    def leave(self, module: types.ModuleType) -> None:
        """Take note of the empty module, and of all that may need it."""
        self._empty = module
        vars(module)["__getattr__"] = functools.partial(_name_of, module)
        _set_traps()

    def _fill(self) -> None:
        """Only under the lock of the import of `_FIRST`, so that other threads wait."""
        module, self._empty = self._empty, None
        if module is not None and self._loader is not None:
            vars(module).pop("__getattr__", None)
            for place in (sys.modules["torch"], sys.modules["torch"].ops):
                later = [n for n, value in vars(place).items() if isinstance(value, _Later)]
                for name in later:
                    delattr(place, name)
            self._loader.exec_module(module)


def _load() -> None:
    importlib.import_module(_FIRST)


class _Leave(Loader):
    """Leaves a module empty."""

    def __init__(self, finder: _Finder) -> None:
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Put off."""
        self._finder.leave(module)


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


def _name_of(module: types.ModuleType, name: str) -> Any:
    if name.startswith("__"):  # what looks through all modules asks for these
        raise AttributeError(name)
    _load()
    return getattr(module, name)


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
