"""Every loss against every promise: one table of losses, one test for each promise."""
import copy
import math
import pickle

import pytest
import torch
from losses_helper import CASES, SPECS, data, gradient, make
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from segkit import losses as L

every = pytest.mark.parametrize("name, mode", CASES)


def reductions(name):
    return ("mean", "sum", "none", "pixel")[:3 + SPECS[name].pixel]


def test_the_table_holds_every_loss_of_masks():
    built = {type(make(name, mode)).__name__ for name, mode in CASES}
    wrappers = {"DeepSupervisionLoss", "MultiTaskLoss", "SegmentationLoss"}  # their parts are losses of this table
    assert {name for name in L.__all__ if name.endswith("Loss")} == built | wrappers


@every
def test_void_pixels_have_no_effect_and_get_no_gradient(name, mode):
    loss, (logits, target) = make(name, mode, ignore_index=255), data(mode)
    target[..., 3:6] = 255
    other = logits.clone()
    other[..., 3:6] = 100 * torch.randn_like(other[..., 3:6])
    for loss.reduction in reductions(name):
        ours, changed = gradient(loss, logits, target), gradient(loss, other, target)
        assert_close(ours, changed, rtol=0, atol=0)
        assert (ours[1][..., 3:6] == 0).all() and (ours[1][..., :3] != 0).any()
    if name in ("BoundaryLoss", "SoftClDiceLoss"): return  # whose pixels have neighbours
    loss.reduction = "mean"
    kept = [t[..., [*range(3), *range(6, 13)]] for t in (logits, target)]
    assert_close(loss(logits, target), loss(*kept), rtol=1e-5, atol=0)


@every
def test_a_void_image_costs_nothing(name, mode):
    loss, (logits, target) = make(name, mode, ignore_index=255), data(mode)
    for loss.reduction in reductions(name):
        value, slope = gradient(loss, logits, torch.full_like(target, 255))
        assert (value == 0).all() and (slope == 0).all()
    loss.reduction = "none"
    target[0] = 255
    value, slope = gradient(loss, logits, target)
    assert value[0] == 0 and (slope[0] == 0).all() and value[1] != 0 and (slope[1] != 0).any()


@every
def test_reductions(name, mode):
    loss, (logits, target) = make(name, mode, ignore_index=255), data(mode, b=3)
    target[0, ..., 3:9] = 255
    alone = torch.stack([loss(a[None], b[None]) for a, b in zip(logits, target)])
    loss.reduction = "none"
    assert loss(logits, target).shape == (3,)
    assert_close(loss(logits, target), alone)
    loss.reduction = "sum"
    if "pixel" not in reductions(name): assert_close(loss(logits, target), alone.sum())
    else:
        logits, target = data(mode)
        whole, loss.reduction = loss(logits, target), "pixel"
        values = loss(logits, target)
        assert values.shape in (logits.shape, logits[:, 0].shape)
        assert_close(values.sum(), whole, rtol=1e-5, atol=1e-5)
        loss.reduction = "mean"
        assert_close(loss(logits, target), values.mean(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reduction"): loss.reduction = "avg"
    with pytest.raises(ValueError, match="reduction"): make(name, mode, reduction="avg")


@every
def test_integers_of_any_type(name, mode):
    loss, (logits, target) = make(name, mode), data(mode)
    value = loss(logits, target)
    values = () if mode == "multiclass" else (torch.bool, torch.float32, torch.float16)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, *values):
        assert_close(loss(logits, target.to(dtype)), value, rtol=0, atol=0)


@every
def test_soft_targets(name, mode):
    loss, (logits, target) = make(name, mode), data(mode, (3, 3), c=3, dtype=torch.float64)
    hard = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).double() if mode == "multiclass" else target.double()
    assert_close(loss(logits, hard), loss(logits, target))
    soft = .8*hard + .2/hard.shape[1]
    if not SPECS[name].soft:
        with pytest.raises(ValueError, match="target of 0 or 1"): loss(logits, soft)
        return
    assert abs(loss(logits, soft) - loss(logits, hard)) > 1e-4
    assert torch.autograd.gradcheck(lambda x: loss(x, soft), logits.requires_grad_())


@every
def test_gradcheck(name, mode):
    loss, (logits, target) = make(name, mode, ignore_index=255), data(mode, (2, 4), c=3, dtype=torch.float64)
    target[0, ..., 1] = 255
    for loss.reduction in reductions(name):
        assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("name", [name for name in SPECS if name != "LovaszLoss per class"])  # the hinge, which LovaszLoss tests
def test_half_precision_of_full_size(name):
    mode = SPECS[name].modes[0]
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 512, 512) * 60, torch.nn.functional.max_pool2d(torch.rand(8, 1, 512, 512), 9, 1, 4)[:, 0] > .99
    loss, target = make(name, mode), y.long()
    if name == "SoftClDiceLoss": loss.iterations = 1
    for dtype in (torch.float16, torch.bfloat16):
        logits = (x if mode == "binary" else torch.cat([x, -x], 1)).to(dtype).requires_grad_()
        value = loss(logits, target)
        (value * 2**16).backward()
        assert value.dtype == torch.float32 and logits.grad.dtype == dtype
        assert logits.grad.isfinite().all() and (logits.grad != 0).any()
        exact = loss(logits.detach().double(), target).item()
        assert math.isclose(value.item(), exact, rel_tol=1e-6), (dtype, value.item(), exact)


@every
def test_probabilities_in_place_of_logits(name, mode):
    if not SPECS[name].probabilities: pytest.skip("takes logits alone")
    loss, (logits, target) = make(name, mode), data(mode, dtype=torch.float64)
    if name == "SumLoss" and mode == "multiclass": pytest.skip("its parts differ: a softmax and one-vs-rest")
    given, probs = make(name, mode, from_logits=False), loss.activation(logits)
    before = probs.clone()
    assert_close(given(probs, target), loss(logits, target), rtol=1e-4, atol=1e-6)
    gradient(given, probs, target)
    assert_close(probs, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="probabilities from 0 to 1"): given(logits, target)


@every
def test_class_weights(name, mode):
    if mode not in SPECS[name].weights:
        if name == "SoftBCEWithLogitsLoss": pytest.skip("has `weight`")
        with pytest.raises(ValueError, match="class_weights"): make(name, mode, class_weights=[1., 2., 3., 4.])
        return
    logits, target = data(mode)
    plain, even, thrice, uneven = (make(name, mode, class_weights=w)(logits, target) for w in (None, [1]*4, [3]*4, [1, 0, 0, 0]))
    assert_close(even, plain)
    assert_close(thrice, plain)
    assert abs(uneven - plain) > 1e-4
    loss = make(name, mode, class_weights=[1, 2, 3, 4])
    assert any(key.endswith("class_weights") for key in loss.state_dict())
    assert {t.device.type for t in loss.to("meta").buffers()} == {"meta"}
    for bad in ([1., 2., 3.], [1., -1., 1., 1.], [0.]*4):
        with pytest.raises(ValueError, match="class_weights"): make(name, mode, class_weights=bad)(logits, target)


@every
def test_inputs_stay_and_layout_and_autocast_change_nothing(name, mode):
    loss, (logits, target) = make(name, mode, ignore_index=255), data(mode)
    target[..., 2] = 255
    before = logits.clone(), target.clone()
    expected = gradient(loss, logits, target)
    loss(logits, target)
    assert_close((logits, target), before, rtol=0, atol=0)
    assert_close(gradient(loss, logits.contiguous(memory_format=torch.channels_last), target), expected, rtol=1e-5, atol=1e-7)
    wide = torch.randn(2, logits.shape[1], 20, 20)
    wide[..., 2:19, 3:16] = logits
    x = wide.requires_grad_()
    assert_close(torch.autograd.grad(loss(x[..., 2:19, 3:16], target), x)[0][..., 2:19, 3:16], expected[1], rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16): found = gradient(loss, logits, target)
    assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)): assert other(logits, target) == expected[0]


class Image(torch.Tensor): pass
class Mask(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if Image in types: return NotImplemented  # as fastai's do
        return super().__torch_function__(func, types, args, kwargs)


@every
def test_typed_tensors_are_numbers(name, mode):
    loss, (logits, target) = make(name, mode), data(mode)
    value = loss(logits.as_subclass(Image), target.as_subclass(Mask))
    assert type(value) is torch.Tensor
    assert_close(value, loss(logits, target), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if "binary" in spec.modes])
def test_binary_shapes(name):
    loss, (logits, target) = make(name, "binary"), data("binary")
    value = loss(logits, target)
    shapes = [(logits, target[:, 0])] if name == "SumLoss" else [(x, y) for x in (logits, logits[:, 0]) for y in (target, target[:, 0])]
    for x, y in shapes: assert_close(loss(x, y), value, rtol=0, atol=1e-7)


@every
def test_errors_in_words(name, mode):
    loss, (logits, target) = make(name, mode), data(mode)
    with pytest.raises(ValueError, match="y_true must hold"): loss(logits, target + 90)
    with pytest.raises(ValueError, match=r"y_pred \(2, .*, 17, 13\) and y_true \(1"): loss(logits, target[:1])
    with pytest.raises(ValueError, match="y_true"): loss(logits, target[..., :-1])
    with pytest.raises(TypeError, match="floating-point"): loss(logits.long(), target)
    if mode == "multiclass":
        with pytest.raises(TypeError, match="integer dtype"): loss(logits, target.float())
    if len(SPECS[name].modes) > 1 and name != "SoftBCEWithLogitsLoss":
        with pytest.raises(ValueError, match="mode='multi-label'.*did you mean 'multilabel'"): make(name, "multi-label")


@every
def test_one_half_is_a_yes(name, mode):
    """A logit of 0, and a probability of exactly .5, in whichever form the loss takes predictions."""
    channels = {"binary": 1, "multilabel": 3, "multiclass": 3}[mode]
    zero = torch.zeros(2, channels, 5, 6)
    forms = [(make(name, mode), zero)]
    if SPECS[name].probabilities: forms.append((make(name, mode, from_logits=False), zero + .5))
    for loss, pred in forms:
        for dtype in (torch.float16, torch.float32, torch.float64):
            probs = loss.activation(pred.to(dtype))
            labels, below = loss.decodes(probs), loss.decodes(probs - .01)
            assert labels.dtype == torch.int64
            assert labels.shape == ((2, 3, 5, 6) if mode == "multilabel" else (2, 5, 6))
            if mode == "multiclass": assert (labels == 0).all()  # the first of equals
            else: assert (labels == 1).all() and (below == 0).all()


@every
def test_decides_as_its_task(name, mode):
    loss, (logits, _) = make(name, mode), data(mode)
    assert loss.task.mode in (mode, None) and loss.task.from_logits
    assert torch.equal(loss.decodes(loss.activation(logits)), loss.task.decision(logits))
    assert isinstance(loss, torch.nn.modules.loss._Loss)  # as SMP's are


class Count(TorchDispatchMode):
    """How many operations run."""
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, mode", [(n, m) for n, m in CASES if m != "binary" and not SPECS[n].loops])
def test_small_classes_run_together(name, mode):
    """As many operations for 24 classes as for 3; large classes Lovász takes one after another."""
    calls = []
    for c in (3, 24):
        loss, (logits, target) = make(name, mode), data(mode, (6, 5), c=c)
        with Count() as count: loss(logits.requires_grad_(), target).backward()
        calls.append(count.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["DiceLoss", "FocalLoss", "OHEMCrossEntropyLoss", "LovaszLoss", "MCCLoss", "SoftClDiceLoss", "BoundaryLoss"])
@pytest.mark.filterwarnings("ignore")
def test_compiles(name):
    loss, (logits, target) = make(name, "multiclass", ignore_index=3), data("multiclass", (6, 5))
    assert_close(gradient(torch.compile(loss, backend="eager"), logits, target), gradient(loss, logits, target))


class ScalarReads(TorchDispatchMode):
    """How often a value is read back from a tensor: on a GPU each time is a synchronisation."""
    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


WITHOUT_SYNC = [(name, {}) for name, spec in SPECS.items() if "multiclass" in spec.modes and not spec.loops]
WITHOUT_SYNC += [(name, {"classes": [1, 2]}) for name in ("DiceLoss", "SoftClDiceLoss")]


@pytest.mark.parametrize("name, options", WITHOUT_SYNC)
def test_no_synchronisation_on_a_gpu(name, options, monkeypatch):
    """The way a GPU goes, which compilation shares, without a GPU."""
    loss, (logits, target) = make(name, "multiclass", ignore_index=255, **options), data("multiclass", (6, 5))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with ScalarReads() as count: loss(logits.requires_grad_(), target).backward()
    assert count.reads == 0
    with pytest.raises(RuntimeError, match="y_true must hold labels from 0 to 3"): loss(logits, target + 90)
