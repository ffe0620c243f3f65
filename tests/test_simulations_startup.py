"""What is deferred at the start of a command is there as soon as it is used.

Each case runs after an ordinary start and after a deferred one, and must say the same.
"""

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence

import pytest

from fedward.simulations.deferred import _MAKERS, _MAKERS_ONLY_THERE, _PUT_OFF

DEFER = "from fedward.simulations.deferred import import_torch; import_torch()\n"
NEEDED = "print(json.dumps('torch._prims' in sys.modules))\n"

CASES = {
    "compiling": """
        f = torch.compile(lambda x: torch.nn.functional.silu(x) + 1, backend="eager")
        print(f(torch.ones(3)).tolist())
    """,
    "exporting": """
        print(torch.export.export(torch.nn.Linear(2, 3), (torch.ones(4, 2),)).graph)
    """,
    "fake tensors": """
        from torch._subclasses import FakeTensorMode
        with FakeTensorMode():
            x = torch.empty(4, 3)
            print(torch.linalg.svd(x).S.shape, torch.fft.rfft(x).dtype, x.argsort(stable=True))
        x = FakeTensorMode().from_tensor(torch.ones(5, 2))
        print(torch.nn.functional.adaptive_avg_pool1d(x[None], 1), x.cumsum(0), x.kthvalue(1))
    """,
    "tracing": """
        from torch.fx.experimental.proxy_tensor import make_fx
        table = torch._decomp.core_aten_decompositions()
        print(make_fx(lambda x: torch.nn.functional.mish(x), decomposition_table=table)(
            torch.ones(2)).code)
    """,
    "meta tensors": """
        x = torch.empty(4, 3, device="meta")
        print(torch.linalg.svd(x), torch.fft.rfft(x), torch.cdist(x, x), x.sort(), x @ x.T)
    """,
    "meta tensors with strides": """
        x = torch.empty_strided((2, 3), (1, 2), device="meta")
        print((x + 1).stride(), torch.cholesky_inverse(x[:, :2]).shape)
    """,
    "moving to meta": """
        x = torch.ones(2, 3, 4).to("meta")
        print(torch.nn.functional.adaptive_avg_pool2d(x, 2).shape, x.median(1), x.histc())
    """,
    "a model on meta": """
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GRU(6, 2))
        print(model[0](torch.empty(1, 3, 8, 8, device="meta")).shape, torch.randn(3).device)
    """,
    "factories on meta": """
        d = {"device": "meta"}
        print(torch.tril_indices(3, 3, **d), torch.triu_indices(3, 3, **d), torch.arange(5, **d),
              torch.eye(3, **d), torch.linspace(0, 1, 3, **d), torch.tensor([1.0], **d),
              torch.randint(3, (2,), **d), torch.scalar_tensor(1, **d), torch.randperm(4, **d),
              torch.hann_window(4, **d), torch.complex(torch.ones(2, **d), torch.ones(2, **d)))
    """,
    "zeros without data": """
        x = torch._efficientzerotensor((2, 2), device="meta")
        print(torch.linalg.svd(x + torch.empty(2, 2, device="meta")).S.shape)
    """,
    "functionalizing": """
        def f(x):
            y = x.clone()
            y[torch.tensor([0])] = 5.0
            y.index_add_(0, torch.tensor([1]), torch.ones(1))
            return y.put_(torch.tensor([2]), torch.tensor([7.0]))
        print(torch.func.functionalize(f)(torch.ones(3)).tolist())
    """,
    "modes of functional tensors": """
        from torch._subclasses.functional_tensor import dispatch_functionalize
        print(dispatch_functionalize(lambda x: x.clone().put_(
            torch.tensor([2]), torch.tensor([7.0])))(torch.ones(3)))
    """,
    "forward derivatives and vmap": """
        f = torch.nn.functional.logsigmoid
        print(torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
              torch.vmap(torch.nn.functional.huber_loss)(torch.ones(2), torch.zeros(2)))
    """,
    "decompositions": """
        from torch._decomp import decomposition_table, meta_table
        print(len(decomposition_table), len(meta_table))
    """,
    "references": "import torch._refs.linalg; print(torch._refs.linalg.norm(torch.ones(4)))\n",
    "primitive operators": "print(torch.ops.prims.add(torch.ones(1), torch.ones(1)))\n",
    "the module itself": """
        from torch._meta_registrations import meta_index_Tensor
        print(meta_index_Tensor.__name__, len(dir(torch._meta_registrations)))
    """,
    "what stores contents": "import torch.utils._content_store as s; print(s.ContentStoreReader)\n",
    "operators of one's own": """
        @torch.library.custom_op("startup::draw", mutates_args=())
        def draw(size: int, generator: torch.Generator) -> torch.Tensor:
            return torch.rand(size, generator=generator)
        print(draw(2, torch.Generator().manual_seed(1)), torch.ops.startup.draw.default._schema)
    """,
    "data loaders": """
        from torch.utils.data import DataLoader, TensorDataset
        print([x[0].tolist() for x in DataLoader(TensorDataset(torch.arange(4)), batch_size=3)])
    """,
    "a part of the data loaders": """
        import torch.utils.data.distributed as d
        print(list(d.DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)))
    """,
    "quantizing": """
        model = torch.nn.Sequential(torch.nn.Linear(2, 3)).eval()
        print(torch.ao.quantization.get_default_qconfig_mapping("x86").to_dict().keys())
        print(torch.quantization.fuse_modules.__name__, torch.nn.quantized.FloatFunctional,
              torch.nn.intrinsic.ConvReLU2d, torch.nn.qat.Linear, torch.nn.quantizable.LSTM)
    """,
    "all names of a module": "from torch.export import *; print(Dim('rows'), export.__name__)\n",
    "saving a module that stands for its name": """
        import io
        file = io.BytesIO()
        torch.save(torch.optim.SGD, file)
        file.seek(0)
        print(torch.load(file, weights_only=False))
    """,
    "threads": """
        from concurrent.futures import ThreadPoolExecutor
        def shape(number):
            return torch.linalg.svd(torch.empty(number + 1, 3, device="meta")).S.shape
        with ThreadPoolExecutor(8) as pool:
            print(list(pool.map(shape, range(8))))
    """,
}


PROCESS = """
import contextlib, gc, io, json, os, sys, textwrap
gc.disable()  # a third of the time of all these imports
{start}
import torch
def in_a_process_of_its_own(code):
    end, begin = os.pipe()
    if os.fork():
        os.close(begin)
        with os.fdopen(end) as said:
            text = said.read()
        os.wait()
        return text
    sys.stdout = os.fdopen(begin, "w")
    try:
        exec(textwrap.dedent(code), {{"torch": torch, "json": json, "sys": sys}})
    except BaseException as error:
        print(repr(error))
    sys.stdout.flush()
    os._exit(0)
def in_this_process(code):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            exec(textwrap.dedent(code), {{"torch": torch, "json": json, "sys": sys}})
        except Exception as error:
            print(repr(error))
    return said.getvalue()
answers = [{how}(code) for code in json.load(sys.stdin)]
print(json.dumps(answers))
"""


def answers(codes: Sequence[str], *, defer: bool) -> list[str]:
    """What each piece of code prints right after `import torch`."""
    code = PROCESS.format(start=DEFER, how="in_a_process_of_its_own")
    if not defer:
        code = PROCESS.format(start="", how="in_this_process")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=json.dumps(codes),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return list(json.loads(process.stdout))


ONLY_DATA = """
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    model(torch.ones(4, 2)).sum().backward()
    torch.zeros(3).normal_(), torch.randn(2).to(torch.float64), torch.linalg.svd(torch.eye(2))
    generator = torch.Generator().manual_seed(3)
    print(torch.randperm(5, generator=generator), isinstance(generator, torch.Generator))
"""
MODULES = "print(json.dumps([name for name in sys.modules if name.startswith('torch')]))"
MAKERS = """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or not has(name, "Meta"):
            continue
        schema = torch._C._get_schema(*name.partition(".")[::2])
        of_nothing = not any("Tensor" in str(a.type) for a in schema.arguments)
        a_tensor = any("Tensor" in str(r.type) for r in schema.returns)
        if of_nothing and a_tensor and not has(name, "CompositeExplicitAutograd"):
            print(name.removeprefix("aten::"))
"""
NAMES = f"""
    import importlib
    for name in {_PUT_OFF!r}:
        print(name, dir(importlib.import_module(name)))
"""
TOO_LATE = f"{DEFER}print(len(vars(torch._meta_registrations)) > 100)"
Said = Mapping[str, tuple[str, str]]


@pytest.fixture(scope="module")
def said() -> Said:
    """By piece of code, what an ordinary process says and what one that defers does."""
    cases = [textwrap.dedent(code) + NEEDED for code in CASES.values()]
    codes = [MODULES, NAMES, MAKERS, TOO_LATE, textwrap.dedent(ONLY_DATA) + NEEDED, *cases]
    names = [MODULES, NAMES, MAKERS, TOO_LATE, ONLY_DATA, *CASES]
    pairs = zip(answers(codes, defer=False), answers(codes, defer=True), strict=True)
    return dict(zip(names, pairs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_needs_what_is_put_off_is_as_ever(case: str, said: Said) -> None:
    ordinary, deferred = said[case]

    assert deferred == ordinary
    assert deferred.endswith("\ntrue\n"), deferred


def test_who_computes_with_data_never_loads_it(said: Said) -> None:
    ordinary, deferred = said[ONLY_DATA]

    assert ordinary.endswith("\ntrue\n")
    assert deferred == ordinary.replace("\ntrue\n", "\nfalse\n")


def test_every_module_that_is_put_off_has_all_its_names_as_soon_as_somebody_looks(
    said: Said,
) -> None:
    ordinary, deferred = said[NAMES]

    assert len(ordinary.splitlines()) == len(_PUT_OFF)
    assert deferred == ordinary


def test_every_module_that_is_left_out_can_be_the_first_to_be_imported(said: Said) -> None:
    """Of 260, every fiftieth: what they need of each other goes round in circles."""
    ordinary, deferred = (set(json.loads(names)) for names in said[MODULES])
    left_out = sorted(ordinary - deferred)
    some = {"torch._refs", "torch._decomp", "torch._export", *left_out[::50]}
    code = "import {0}, torch.export; print(sys.modules['{0}'], torch.export.export.__name__)"

    codes = [code.format(name) for name in sorted(some)]

    assert some <= set(left_out)
    assert answers(codes, defer=True) == answers(codes, defer=False)


def test_every_operator_that_makes_a_meta_tensor_of_nothing_loads_the_kernels(said: Said) -> None:
    """Any other that does has a composite kernel, which asks one of these."""
    made, _ = said[MAKERS]

    # A sparse tensor's parts are tensors of their own, which the others make.
    expected = {*_MAKERS, *_MAKERS_ONLY_THERE, "_sparse_coo_tensor_with_dims"}
    assert set(made.split()) == expected


def test_a_process_that_has_torch_already_is_left_alone(said: Said) -> None:
    ordinary, _ = said[TOO_LATE]

    assert ordinary == "True\n"


def run_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_a_start_leaves_a_process_that_simulates_and_collects_its_garbage() -> None:
    done = run_process("""
        import gc, sys, threading
        from fedward.simulations.startup import start
        start()
        before = gc.isenabled(), "fedward.simulations.simulate" in sys.modules
        start()
        print(*before, gc.isenabled(), threading.active_count(), "torch._refs" in sys.modules)
        print(gc.get_threshold()[0] > 10_000)
    """)

    assert done.stdout == "True True True 1 False\nTrue\n", done.stderr


END = """
    import atexit, sys, threading, time
    from fedward.simulations.startup import run

    class Slow:
        def __del__(self):
            print("taken apart")

    kept = Slow()

    def main():
        atexit.register(print, "registered")
        threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
        sys.stdout.write("main ")
        {last}

    run(main)
"""


@pytest.mark.parametrize(
    ("last", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3)]
)
def test_the_end_waits_for_all_but_the_taking_apart(last: str, status: int) -> None:
    done = run_process(END.format(last=last))

    assert done.stdout == "main thread\nregistered\n"
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize(
    ("last", "said"), [("sys.exit('why')", "why"), ("raise ValueError('why')", "ValueError: why")]
)
def test_an_end_that_has_something_to_say_is_as_ever(last: str, said: str) -> None:
    done = run_process(END.format(last=last))

    assert done.stdout == "main thread\nregistered\ntaken apart\n"
    assert done.returncode == 1
    assert done.stderr.endswith(f"{said}\n")
