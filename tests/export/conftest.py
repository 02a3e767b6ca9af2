"""Small networks with weights that leave no branch idle, and what every rewrite of the deploy form promises.

A rewrite's proof is only as good as its weights: with initial ones a dynamic ReLU is a plain ReLU, a norm the identity
and an attention uniform, so that a wrong rewrite of them would pass. `test_deploy_pipeline.py` checks that here every
parameter and statistic moves the output.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgevit.export.deploy import REWRITES, DeploySpec
from edgevit.export.deploy.certificate import Rewrite, certify
from edgevit.models import ADDED, vit, vit_lsla
from edgevit.models.crossformer import CrossFormer, CrossFormerConfig, Rule
from edgevit.models.layers import GroupedBlock
from edgevit.models.mobile_former import CONFIGS, MobileFormer, MobileFormerConfig, Row
from edgevit.models.swin import SwinConfig, SwinTransformer
from edgevit.models.vit import VisionTransformer, ViTConfig
from edgevit.models.vit_lsla import LslaConfig, LslaOptions, VitLsla
from edgevit.specs import Certificate

EXACT = 1e-9  # of float64 rewrites, which land near 1e-15: the design's limit, MAX_REL of the certificates
SHAPES = ((1, 64, 96), (3, 32, 32), ("dynamic", 32, 64))  # batch, height, width: 32x32 is 1x1 at stride 32
CLASSES = 10


def rows(*values: tuple[Any, int, int, int, int]) -> tuple[Row, ...]:
    return tuple(Row(*value) for value in values)


# Every kind of block: lite with stride or residual, pointwise first with and without residual, hidden widths that are
# and are not multiples of 16, depthwise multipliers 1 to 4. Columns: kind, e1, channels, stride, e2.
STRIDED = rows(
    ("D", 3, 12, 2, 0),
    ("S", 3, 12, 1, 3),
    ("D", 4, 16, 2, 2),
    ("S", 2, 24, 1, 1),
    ("D", 2, 24, 2, 3),
    ("S", 2, 24, 1, 1),
    ("D", 3, 32, 2, 2),
)
RESIDUAL = rows(
    ("D", 2, 8, 1, 0),
    ("D", 3, 12, 2, 4),
    ("D", 1, 16, 2, 2),
    ("S", 3, 16, 1, 1),
    ("D", 2, 16, 2, 1),
    ("D", 2, 32, 2, 2),
)
TINY = {
    "plain": (MobileFormerConfig(8, 3, 32, 24, STRIDED), {}),
    "residual": (MobileFormerConfig(8, 5, 48, 24, RESIDUAL), {}),
    "grouped": (MobileFormerConfig(8, 3, 32, 24, STRIDED, groups=4), {}),
    "two_groups": (MobileFormerConfig(8, 5, 48, 24, RESIDUAL, groups=2), {}),
    "spatial": (MobileFormerConfig(8, 3, 32, 24, STRIDED), {"spatial_dynamic_relu": True}),
    "spatial_grouped": (MobileFormerConfig(8, 3, 32, 24, STRIDED, groups=4), {"spatial_dynamic_relu": True}),
    "features": (MobileFormerConfig(8, 3, 32, 24, STRIDED), {"features_only": True}),
    "spatial_features": (
        MobileFormerConfig(8, 5, 48, 24, RESIDUAL),
        {"features_only": True, "spatial_dynamic_relu": True},
    ),
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in float64 and eval, every parameter and statistic drawn so that clips, norms and softmaxes all work."""
    draw = torch.Generator().manual_seed(seed)
    module.double().eval().requires_grad_(False)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, dtype=tensor.dtype, generator=draw)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif "tokens.weight" in name:
            tensor.copy_(noise)
        elif name.endswith(ADDED):
            tensor.copy_(0.5 * noise)  # beside logits and tokens of unit size
        elif tensor.dim() >= 2:
            steers = "hyper.2" in name or "alpha.0" in name  # clipped at -3 and 3: reach both ends
            gain = 5.0 if steers else 0.8 if tensor.dim() == 4 else 0.6  # no map grows, no attention is one-hot
            gain *= 4 if ".attn.pos." in name else 1  # so that offsets differ in which of DPB's ReLUs they pass
            tensor.copy_(gain * noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * noise)
    return module


def build(name: str, seed: int = 0, **options: Any) -> MobileFormer:
    """A network of `TINY`, or of the published table, with random weights in float64."""
    config, fixed = TINY[name] if name in TINY else (CONFIGS[name], {})
    model = MobileFormer(config, **{"num_classes": CLASSES, **fixed, **options})
    randomized(model, seed)
    return model


def swin(window: int = 7, *, features_only: bool = False) -> SwinTransformer:
    """Four stages of a plain and a shifted block; 1, 2, 4, 8 heads."""
    return SwinTransformer(SwinConfig(32, (2, 2, 2, 2)), window, CLASSES, features_only=features_only)


def crossformer(rule: Rule = "new", *, features_only: bool = False, **config: Any) -> CrossFormer:
    """SDA and LDA in each stage but the last; 1 head of width 48, then 3, 6, 12 of 32, so that DPB has 3 channels."""
    config = {"depths": (2, 2, 2, 1), **config}
    return CrossFormer(CrossFormerConfig(48, **config), rule, CLASSES, features_only=features_only)


def plain(grid: int, *, distilled: bool = False) -> VisionTransformer:
    """Three blocks of one head; positions for `grid` x `grid` patches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "DEPTH", 3)
        return VisionTransformer(ViTConfig(64, distilled=distilled), grid, CLASSES)


def lsla(merging: Any = "conv", *, features_only: bool = False, **options: Any) -> VitLsla:
    """Four stages of a plain and a shifted block; 1, 2, 4, 8 heads, which a published variant has three times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_lsla, "WIDTH", 32)
        return VitLsla(
            LslaConfig((2, 2, 2, 2), 2, 8, merging), LslaOptions(**options), CLASSES, features_only=features_only
        )


# As CrossFormer++H has them: a cooling layer in the first stage, whose groups of 4 divide most maps.
PLUS = {"depths": (4, 2, 1, 1), "groups": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True}
PYRAMID = {"groups": (14, 14, 7, 7), "intervals": (16, 8, 2, 1)}  # as segmenters on a feature pyramid have them
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "swin": swin,
    "swin_features": lambda: swin(4, features_only=True),
    "crossformer": crossformer,
    "crossformer_old": lambda: crossformer("old_classifier"),
    "crossformer_old_features": lambda: crossformer("old_dense", features_only=True),
    "crossformer_pyramid": lambda: crossformer("old_dense", features_only=True, **PYRAMID),
    "crossformer_plus": lambda: crossformer(**PLUS),
    "lsla": lsla,
    "lsla_features": lambda: lsla("linear", features_only=True, mask_outer_bias=False, projections="qxv"),
    "lsla_plain": lambda: lsla(projections="qkv", dynamic_scale=False, outer_bias=False),
    "vit": lambda: plain(2),
    "vit_distilled": lambda: plain(3, distilled=True),
}


def attention(name: str, seed: int = 0) -> nn.Module:
    """A network of `NETWORKS` with random weights in float64."""
    return randomized(NETWORKS[name](), seed)


def blocks(model: nn.Module) -> list[GroupedBlock]:
    """Its attention blocks in their order."""
    return [m for m in model.modules() if isinstance(m, GroupedBlock)]


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Random float64 input; seed 0 is the certificate's own picture."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def difference(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected magnitude, over all outputs; shapes and types must agree."""
    pairs = list(zip(tensors(actual), tensors(expected), strict=True))
    assert [a.shape for a, _ in pairs] == [e.shape for _, e in pairs]
    assert [a.dtype for a, _ in pairs] == [e.dtype for _, e in pairs]
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


def batches(spec: DeploySpec) -> tuple[int, ...]:
    return (1, 2, 5) if spec.batch == "dynamic" else (spec.batch,)


def prepared(rewrite: Rewrite, model: nn.Module, spec: DeploySpec) -> nn.Module:
    """`model` as it comes to `rewrite` in the pipeline: all earlier rewrites applied, to `model` itself."""
    form = model
    for earlier in REWRITES[: REWRITES.index(rewrite)]:
        form = earlier(form, spec)[0]
    return form


def certified(rewrite: Rewrite, model: nn.Module, spec: DeploySpec) -> tuple[nn.Module, Certificate]:
    """Apply `rewrite` and hold it to what every rewrite promises; return the rewritten module and its certificate."""
    picture, state = str(model), {key: value.clone() for key, value in model.state_dict().items()}
    after, certificate, _ = certify(rewrite, model, spec)
    assert certificate is not None
    assert certificate.rewrite == rewrite.__name__
    assert certificate.places > 0
    assert certificate.max_rel < EXACT
    assert str(model) == picture
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for batch in batches(spec):
        images = normal(batch, 3, spec.height, spec.width)
        assert difference(after(images), model(images)) < EXACT
    picture, state = str(after), {key: value.clone() for key, value in after.state_dict().items()}
    again, places, _ = rewrite(after, spec)
    assert places == 0
    assert again is after
    assert str(after) == picture
    assert all(torch.equal(value, state[key]) for key, value in after.state_dict().items())
    return after, certificate


def alone(rewrite: Rewrite, module: nn.Module, batch: int | str = 1) -> nn.Module:
    """`rewrite` on a single block, which a rewrite only finds inside a parent; a second application finds nothing."""
    spec = DeploySpec(batch, 32, 32)  # type: ignore[arg-type]  # 1, 2, ... or "dynamic"
    parent, places, _ = rewrite(nn.ModuleDict({"block": copy.deepcopy(module)}), spec)
    assert places == 1
    assert rewrite(parent, spec)[1] == 0
    block = parent.get_submodule("block")
    assert type(block) is not type(module)
    return block


class Recorder(TorchDispatchMode):
    """What really ran: (operator, elements of its first tensor operand), and the outputs of some operators."""

    def __init__(self, *kept: str) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.kept, self.outputs = kept, list[Tensor]()
        self.rank = 0  # of the largest tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = next((a.numel() for a in args if isinstance(a, Tensor)), 0)
        name = str(func).removeprefix("aten.").split(".")[0]
        self.calls.append((name, size))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.rank = max(self.rank, out.dim())
            if name in self.kept:
                self.outputs.append(out)
        return out

    def count(self, *names: str, elements: int | None = None) -> int:
        return sum(name in names and elements in (None, size) for name, size in self.calls)


@contextmanager
def recorded(*kept: str) -> Iterator[Recorder]:
    with Recorder(*kept) as recorder:
        yield recorder


def kinds(module: nn.Module) -> Counter[str]:
    """How many submodules of each class there are."""
    return Counter(type(m).__name__ for m in module.modules())


class Workshop:
    """The functions above, for test modules: pytest's importlib mode has no import between test files."""

    exact = EXACT
    networks = NETWORKS
    build = staticmethod(build)
    swin = staticmethod(swin)
    crossformer = staticmethod(crossformer)
    lsla = staticmethod(lsla)
    network = staticmethod(attention)
    blocks = staticmethod(blocks)
    randomized = staticmethod(randomized)
    normal = staticmethod(normal)
    tensors = staticmethod(tensors)
    difference = staticmethod(difference)
    prepared = staticmethod(prepared)
    certified = staticmethod(certified)
    alone = staticmethod(alone)
    recorded = staticmethod(recorded)
    kinds = staticmethod(kinds)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two threads on a busy machine turn float64 depthwise convolutions from ms into minutes


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For whole files: `pytestmark = pytest.mark.usefixtures("no_grad")`."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def shop() -> Workshop:
    return Workshop()


CASES = [(name, shape) for name in TINY for shape in SHAPES if shape[0] != 3 or name in ("plain", "spatial_features")]


def shape_id(shape: Any) -> str:
    return "x".join(map(str, shape))


@pytest.fixture(params=SHAPES, ids=shape_id)
def spec(request: pytest.FixtureRequest) -> DeploySpec:
    """Input shapes; a "dynamic" batch is run at 1, 2 and 5 pictures."""
    return DeploySpec(*request.param)


@pytest.fixture(params=TINY)
def small(request: pytest.FixtureRequest) -> MobileFormer:
    """Each small network."""
    return build(request.param)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    """The name of each small network of grouped attention."""
    return str(request.param)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{shape_id(case[1])}")
def case(request: pytest.FixtureRequest) -> tuple[MobileFormer, DeploySpec]:
    """Each small network, at one picture and at any number, some at a fixed batch and the smallest size too."""
    name, shape = request.param
    return build(name), DeploySpec(*shape)
