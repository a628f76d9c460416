"""Masks and labels in one `Learner`: what fastai does with one target must work with two"""
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.all import CSVLogger, GradientAccumulation, GradientClip, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.transforms import IndexSplitter, Normalize, get_c
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import DiceMulti, F1Score, JaccardCoeffMulti, accuracy, foreground_acc
from fastai.torch_core import TensorMask
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torch import nn
from torch.nn import functional as F

from segkit.core.registry import architectures
from segkit.data import shapes_dataloaders, shims
from segkit.data.targets import Targets, check_items, read_targets
from segkit.decoders import Unet
from segkit.learner import (
    EMA,
    Checkpoint,
    MaskScore,
    SegmentationInterpretation,
    SegmentationLearner,
    default_loss,
    label_metric,
    mask_metric,
    segmentation_learner,
    segmentation_splitter,
)
from segkit.losses import MultiTaskLoss

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{hidden.message}") for hidden in shims.HIDDEN.values()]  # pytest sets all filters anew
CODES, LABELS = ["ground", "square", "edge"], ["odd", "even"]
SMALL = dict(encoder_name="resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 8))

# data: squares with edges on disk

def write(folder, n=6, size=32):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        mask = np.zeros((size, size), np.uint8)
        y, x, s = rng.integers(2, 12), rng.integers(2, 12), rng.integers(10, 18)
        mask[y:y+s, x:x+s] = 2
        mask[y+3:y+s-3, x+3:x+s-3] = 1
        Image.fromarray(np.stack([mask*100, 200 - mask*50, mask*20 + i], -1)).save(folder/f"{i}.bmp")
        Image.fromarray(mask).save(folder/f"{i}.png")
    return sorted(folder.glob("*.bmp"))

def mask_of(path): return path.with_suffix(".png")
def label_of(path): return LABELS[int(path.stem) % 2]
def labels_of(path): return [LABELS[0], LABELS[1]][:1 + int(path.stem) % 2]

class MaskStack(TensorMask):
    "A mask with a channel for each class, for multi-label masks"
    @classmethod
    def create(cls, path):
        mask = torch.from_numpy(np.array(Image.open(path))).long()
        return cls(torch.stack([mask > 0, mask == 1]).long())

def loaders(files, labels="single", mask=None, bs=2, **kwargs):
    blocks, get_y = [ImageBlock, mask or MaskBlock(CODES)], [mask_of]
    if labels: blocks.append(CategoryBlock if labels == "single" else MultiCategoryBlock); get_y.append(label_of if labels == "single" else labels_of)
    block = DataBlock(blocks, n_inp=1, get_y=get_y, splitter=IndexSplitter([4, 5]), **kwargs)
    return block.dataloaders(files, bs=bs, path=files[0].parent, device="cpu", num_workers=0)

@pytest.fixture(scope="module")
def files(tmp_path_factory): return write(tmp_path_factory.mktemp("squares"))

@pytest.fixture
def pair(files):
    torch.manual_seed(0)
    return quiet(segmentation_learner(loaders(files), "Unet", aux_params={}, **SMALL))

@pytest.fixture
def alone(files):
    torch.manual_seed(0)
    return quiet(segmentation_learner(loaders(files, labels=None), "Unet", **SMALL))

def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def both(learn): return isinstance(learn.model(torch.zeros(1, 3, 32, 32)), tuple)

@pytest.fixture(params=["pair", "alone"])
def learn(request): return request.getfixturevalue(request.param)

# the factory

def test_classes_come_from_the_codes_and_labels_from_the_label_block(pair):
    assert get_c(pair.dls) == 2  # what fastai would have taken
    mask, label = pair.model.eval()(torch.zeros(2, 3, 32, 32))
    assert mask.shape == (2, 3, 32, 32) and label.shape == (2, 2)
    assert pair.task == Targets(3, "multiclass", CODES, "multiclass", sorted(LABELS), None, 3)

@pytest.mark.parametrize("arch", ["Unet", "unet", "UNET", Unet])
def test_architecture_by_name_and_by_class(files, arch):
    assert isinstance(segmentation_learner(loaders(files, None), arch, **SMALL).model, Unet)

def test_architecture_of_segmentation_models_pytorch(files):
    smp = pytest.importorskip("segmentation_models_pytorch")
    learn = quiet(segmentation_learner(loaders(files), smp.Unet, aux_params={}, **SMALL))
    learn.freeze()
    learn.fit(1)
    assert len(learn.opt.param_lists) == 3 and not any(p.requires_grad for p in learn.model.encoder.parameters())

def test_unknown_architecture_proposes_a_name(files):
    with pytest.raises(ValueError, match="Unet"): segmentation_learner(loaders(files, None), "Unett", **SMALL)

def test_unknown_keyword_is_refused(files):
    with pytest.raises(TypeError): segmentation_learner(loaders(files, None), "Unet", pretraind=True, **SMALL)
    with pytest.raises(TypeError, match="opt_fun"): segmentation_learner(loaders(files, None), nn.Conv2d(3, 3, 1), opt_fun=None)

def test_a_built_model_of_any_kind(files):
    dls = loaders(files, None)
    learn = quiet(segmentation_learner(dls, nn.Conv2d(3, 3, 1)))
    assert not [t for t in dls.after_batch.fs if isinstance(t, Normalize)] and learn.dls is dls
    learn.fit(1)
    assert len(learn.opt.param_lists) == 1

def test_a_model_whose_encoder_is_no_pyramid(files):
    "As models of other libraries have: the encoder stays whole, and can be frozen"
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 3, 1)
        def forward(self, x): return self.head(self.encoder(x))
    learn = quiet(segmentation_learner(loaders(files, None), Foreign()))
    learn.freeze()
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert [len(g) for g in learn.opt.param_lists] == [4, 2]
    assert [torch.equal(a, b) for a, b in zip(before, learn.model.parameters())] == [True]*4 + [False]*2

def test_grey_pictures_get_a_model_with_one_channel(files):
    from fastai.vision.core import PILImageBW
    dls = DataBlock([ImageBlock(PILImageBW), MaskBlock(CODES)], get_y=mask_of, splitter=IndexSplitter([4, 5])).dataloaders(files, bs=2, device="cpu")
    assert segmentation_learner(dls, "Unet", **SMALL).model(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)

def test_only_a_pretrained_encoder_starts_frozen(files):
    encoder = Unet(**SMALL).encoder.state_dict()
    random = segmentation_learner(loaders(files, None), "Unet", **SMALL)
    given = segmentation_learner(loaders(files, None), "Unet", **SMALL | dict(encoder_weights=encoder))
    assert all(p.requires_grad for p in random.model.parameters())
    assert not any(p.requires_grad for p in given.model.encoder.parameters())
    assert all(p.requires_grad for p in given.model.decoder.parameters())
    assert all(p.requires_grad for p in given.model.segmentation_head.parameters())

def statistics(dls): return [(t.mean.flatten().tolist(), t.std.flatten().tolist()) for t in dls.after_batch.fs if isinstance(t, Normalize)]

def test_normalisation_is_replaced_and_the_other_learner_keeps_its_own(files):
    pretrained = SMALL | dict(encoder_weights=Unet(**SMALL).encoder.state_dict())
    dls = loaders(files, None, batch_tfms=Normalize.from_stats([.5]*3, [.5]*3, cuda=False))
    learn = segmentation_learner(dls, "Unet", **pretrained)
    assert np.allclose(statistics(learn.dls)[0], [[.485, .456, .406], [.229, .224, .225]])
    assert np.allclose(statistics(dls), [[[.5]*3]*2])
    assert np.allclose(statistics(segmentation_learner(dls, "Unet", normalize=False, **pretrained).dls), [[[.5]*3]*2])
    assert segmentation_learner(learn.dls, "Unet", **pretrained).dls is learn.dls  # the same statistics again: nothing to do

def test_without_weights_the_statistics_are_those_of_the_data(files):
    learn = segmentation_learner(loaders(files, None), "Unet", **SMALL)
    pixels = np.concatenate([np.array(Image.open(f)).reshape(-1, 3) for f in files[:4]])/255  # the training pictures
    assert np.allclose(statistics(learn.dls), [[pixels.mean(0), pixels.std(0)]], atol=1e-6)
    dls = loaders(files, None, batch_tfms=Normalize.from_stats([.5]*3, [.5]*3, cuda=False))
    assert segmentation_learner(dls, "Unet", **SMALL).dls is dls  # the data said how

def test_unknown_weights_are_an_error(files):
    smp = pytest.importorskip("segmentation_models_pytorch")
    class Model(smp.Unet):  # one that does not look at the name
        def __init__(self, encoder_weights, **kwargs): super().__init__(encoder_weights=None, **kwargs)
    for arch in ("Unet", Model):
        with pytest.raises((KeyError, ValueError), match="misspelt"): segmentation_learner(loaders(files, None), arch, **SMALL | dict(encoder_weights="misspelt"))

# training

def test_fit_reports_both_heads(learn):
    learn.fit(1)
    parts = ["mask_loss", "label_loss"] if both(learn) else []
    assert learn.recorder.metric_names[1:-1] == ["train_loss", "valid_loss", *parts, "mask_miou", "mask_dice", *(["label_accuracy"] if both(learn) else [])]
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_valid_loss_is_the_weighted_sum_of_its_parts(pair):
    pair.fit(1)
    row = dict(zip(pair.recorder.metric_names[1:], pair.recorder.values[-1]))
    assert row["valid_loss"] == pytest.approx(row["mask_loss"] + .3*row["label_loss"], rel=1e-5)

def test_one_cycle_fine_tune_and_lr_find(learn):
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert [round(h["lr"]/learn.opt.hypers[0]["lr"]) for h in learn.opt.hypers] == [1, 10, 100]
    learn.fine_tune(1, freeze_epochs=1)
    assert learn.opt.frozen_idx == 0
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    assert learn.lr_find(show_plot=False, num_it=6, stop_div=False).valley > 0
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())

def test_a_frozen_encoder_does_not_move_at_all(learn):
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.encoder.state_dict().items()}
    head = learn.model.segmentation_head[0].weight.clone()
    learn.fit(1)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.encoder.state_dict().items())
    assert not torch.equal(head, learn.model.segmentation_head[0].weight)

def test_norms_of_a_frozen_encoder_are_trained_when_asked(files):
    learn = quiet(segmentation_learner(loaders(files, None), "Unet", train_bn=True, **SMALL))
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.encoder.state_dict().items()}
    learn.fit(1)
    moved = {k for k, v in learn.model.encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert any("running_mean" in k for k in moved) and not any("conv" in k for k in moved)

def test_learned_task_weights_are_trained(files):
    dls = loaders(files)
    loss = default_loss(read_targets(dls), "uncertainty")
    learn = quiet(segmentation_learner(dls, "Unet", aux_params={}, loss_func=loss, **SMALL))
    learn.fit(1)
    assert loss.log_variances.abs().min() > 0

def test_a_loss_set_later_is_not_left_untrained(files):
    learn = quiet(segmentation_learner(loaders(files), "Unet", aux_params={}, **SMALL))
    learn.loss_func = default_loss(learn.task, "uncertainty")
    with pytest.raises(ValueError, match=r"optimiser does not know \(log_variances\)"): learn.fit(1)
    learn.evaluate()
    learn.create_opt()
    learn.fit(1)
    assert learn.loss_func.log_variances.abs().min() > 0

CALLBACKS = {"SaveModel": partial(SaveModelCallback, monitor="mask_miou"), "EarlyStopping": partial(EarlyStoppingCallback, monitor="mask_dice"),
             "ReduceLROnPlateau": ReduceLROnPlateau, "CSVLogger": CSVLogger, "GradientAccumulation": partial(GradientAccumulation, 2),
             "GradientClip": GradientClip, "ChannelsLast": ChannelsLast, "ActivationStats": ActivationStats}

@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_of_fastai(learn, name, tmp_path):
    learn.path = tmp_path
    learn.fit(1, cbs=CALLBACKS[name]())
    assert np.isfinite(learn.recorder.values[-1]).all()

@pytest.mark.parametrize("precision", ["to_bf16", "to_fp16"])
def test_mixed_precision(learn, precision):
    getattr(learn, precision)().fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_progress_bars_and_graph(learn):
    learn.add_cb(ProgressCallback())
    learn.fit(1, cbs=ShowGraphCallback())
    assert len(learn.recorder.values) == 1
    learn.predict_tiled(learn.dls.valid.items[0], tile=16)

# predictions

def test_get_preds_with_all_flags(learn):
    image, probs, targets, decoded, losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    image, mask = learn.dls.valid.one_batch()[:2]
    out = learn.model.eval()(image)
    logits = out[0] if both(learn) else out
    first = (lambda t: t[0]) if both(learn) else (lambda t: t)
    assert torch.allclose(first(probs), logits.softmax(1), atol=1e-6)
    assert torch.equal(first(decoded), logits.argmax(1)) and torch.equal(first(targets), mask)
    each = [learn.loss_func(tuple(p[i:i+1] for p in out) if both(learn) else out[i:i+1], *(t[i:i+1] for t in learn.dls.valid.one_batch()[1:])) for i in range(2)]
    assert torch.allclose(losses, torch.stack(each), atol=1e-5)
    if both(learn): assert probs[1].shape == (2, 2) and decoded[1].shape == (2,) and targets[1].shape == (2,)

def test_predict_has_no_batch_dimension(learn, files):
    decoded, classes, probs = learn.predict(files[0])
    image = learn.dls.test_dl([files[0]]).one_batch()[0]
    out = learn.model.eval()(image)
    if both(learn):
        assert torch.allclose(probs[0], out[0].softmax(1)[0], atol=1e-6) and torch.allclose(probs[1], out[1].softmax(1)[0], atol=1e-6)
        assert classes[0].shape == (32, 32) and classes[1].shape == () and decoded[1] == learn.dls.vocab[classes[1]]
        decoded = decoded[0]
    else: assert torch.allclose(probs, out.softmax(1)[0], atol=1e-6)
    assert decoded.shape == (32, 32)

def test_export_and_load(learn, files, tmp_path):
    learn.path = tmp_path
    learn.export("learner.pkl")
    again = load_learner(tmp_path/"learner.pkl")
    assert isinstance(again, SegmentationLearner) and again.task == learn.task
    (a, b) = (x.predict(files[1])[2] for x in (learn, again))
    assert all(torch.equal(p, q) for p, q in (zip(a, b) if both(learn) else [(a, b)]))

def test_save_and_load_through_a_compiled_model(alone, tmp_path):
    alone.path = tmp_path
    plain = alone.model
    before = plain.segmentation_head[0].weight.clone()
    alone.model = torch.compile(plain, backend="eager")
    alone.save("compiled")
    assert not any(k.startswith("_orig_mod") for k in torch.load(tmp_path/"models/compiled.pth", weights_only=False)["model"])
    plain.segmentation_head[0].weight.data.zero_()
    alone.load("compiled")
    assert torch.equal(plain.segmentation_head[0].weight, before)
    alone.model = plain
    plain.segmentation_head[0].weight.data.zero_()
    alone.load("compiled")
    assert torch.equal(plain.segmentation_head[0].weight, before)
    alone.model = torch.compile(plain, backend="eager")
    Learner.save(alone, "stock")  # with the compiler's names, as fastai writes them
    alone.model = plain
    plain.segmentation_head[0].weight.data.zero_()
    alone.load("stock")
    assert torch.equal(plain.segmentation_head[0].weight, before)

def test_pictures(learn):
    from matplotlib import pyplot as plt
    learn.dls.show_batch()
    figure = learn.show_results(max_n=2)
    assert len(figure.axes) == 6
    title = figure.axes[0].get_title()
    assert (any(label in title for label in LABELS) and "(" in title) if both(learn) else title == ""
    Interpretation.from_learner(learn).plot_top_losses(2)
    Interpretation.from_learner(learn).show_results([0, 1])
    learn.summary()
    plt.close("all")

def test_tta_keeps_an_oracle_perfect(files):
    class Oracle(nn.Module):
        "Reads the class off the first channel, which holds 0, 100 or 200"
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(1))
        def forward(self, x): return -(x[:, :1]*255 - torch.tensor([0., 100, 200], device=x.device)[:, None, None]).abs()*self.scale
    learn = quiet(segmentation_learner(loaders(files, None), Oracle()))
    for views in ("flip", "turns", "dihedral"):
        probs, masks = learn.tta(views=views)
        assert torch.equal(probs.argmax(1), masks)
    assert learn.evaluate(views="dihedral")["mask_miou"] == 1

def test_tta_returns_pairs_for_two_outputs(pair):
    (mask, label), (true, level) = pair.tta(views="turns")
    plain, _ = pair.get_preds()
    assert mask.shape == plain[0].shape and label.shape == (2, 2) and true.shape == (2, 32, 32) and level.shape == (2,)
    assert torch.allclose(mask.sum(1), torch.ones(2, 32, 32), atol=1e-5) and not torch.allclose(mask, plain[0], atol=1e-5)
    assert isinstance(pair.model, Unet)

def test_tiles_agree_with_the_whole_for_a_pointwise_model(files, tmp_path):
    learn = quiet(segmentation_learner(loaders(files, None), nn.Conv2d(3, 3, 1)))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (75, 90, 3), np.uint8)).save(tmp_path/"large.png")
    mask, probs = learn.predict_tiled(tmp_path/"large.png", tile=32, overlap=9, with_probs=True)
    whole = learn.predict(tmp_path/"large.png")[2]
    assert torch.allclose(probs, whole, atol=1e-5) and torch.equal(mask.long(), whole.argmax(0))

def test_tiles_of_a_model_with_two_outputs(pair, files):
    mask = pair.predict_tiled(files[0], tile=16, bs=3)
    assert mask.shape == (32, 32) and mask.dtype == torch.uint8
    with pytest.raises(ValueError, match="overlap=16"): pair.predict_tiled(files[0], tile=16, overlap=16)

# metrics

def predictions(learn, dl=None):
    probs, targets = learn.get_preds(dl=dl)
    return (probs[0], targets[0]) if both(learn) else (probs, targets)

def test_mask_scores_are_those_of_scikit_learn(learn):
    values = learn.evaluate()
    probs, true = predictions(learn)
    pred, true = probs.argmax(1).flatten(), true.flatten()
    assert values["mask_miou"] == pytest.approx(jaccard_score(true, pred, average="macro"))
    assert values["mask_dice"] == pytest.approx(f1_score(true, pred, average="macro"))

def test_stock_metrics_see_their_own_output(pair):
    metrics = [mask_metric(DiceMulti()), mask_metric(JaccardCoeffMulti), mask_metric(foreground_acc), mask_metric(F1Score(average="macro")),
               label_metric(accuracy), label_metric(F1Score(average="macro"))]
    values = pair.evaluate(metrics=metrics)
    (probs, level), (true, label) = pair.get_preds()
    pred = probs.argmax(1).flatten()
    assert values["mask_f1_score"] == pytest.approx(f1_score(true.flatten(), pred, average="macro"))
    assert values["mask_jaccard_coeff_multi"] == pytest.approx(jaccard_score(true.flatten(), pred, average="macro"))
    assert values["label_accuracy"] == pytest.approx((level.argmax(1) == label).float().mean().item())
    assert values["label_f1_score"] == pytest.approx(f1_score(label, level.argmax(1), average="macro"))

def test_void_pixels_count_in_no_score_and_no_loss(tmp_path):
    files = write(tmp_path)
    for path in files:
        mask = np.array(Image.open(mask_of(path)))
        mask[:4] = 255
        Image.fromarray(mask).save(mask_of(path))
    learn = quiet(segmentation_learner(loaders(files, None), "Unet", ignore_index=255, **SMALL))
    learn.fit(1)
    values = learn.evaluate(metrics=[MaskScore("miou", learn.task), mask_metric(DiceMulti(), ignore_index=255)])
    probs, true = learn.get_preds()
    pred, true = probs.argmax(1)[:, 4:].flatten(), true[:, 4:].flatten()
    assert values["mask_miou"] == pytest.approx(jaccard_score(true, pred, average="macro"))
    assert values["mask_dice_multi"] == pytest.approx(f1_score(true, pred, average="macro"))
    image, mask = learn.dls.valid.one_batch()
    logits = learn.model.eval()(image).detach()
    changed = logits.clone()
    changed[:, :, :4] = 100*torch.randn_like(changed[:, :, :4])
    assert torch.allclose(learn.loss_func(logits, mask), learn.loss_func(changed, mask))

# other kinds of masks and labels

def test_binary_masks_have_one_logit(tmp_path):
    files = write(tmp_path)
    for path in files: Image.fromarray((np.array(Image.open(mask_of(path))) > 0).astype(np.uint8)).save(mask_of(path))
    learn = quiet(segmentation_learner(loaders(files, None, mask=MaskBlock(["no", "yes"])), "Unet", classes=1, **SMALL))
    learn.fit(1)
    probs, true, decoded = learn.get_preds(with_decoded=True)
    assert probs.shape == (2, 1, 32, 32) and torch.equal(decoded, (probs[:, 0] >= .5).long())
    assert learn.evaluate()["mask_miou"] == pytest.approx(jaccard_score(true.flatten(), decoded.flatten()))
    learn.show_results()
    assert learn.predict(files[0])[1].shape == (32, 32)

def test_a_probability_of_a_half_is_a_yes_everywhere(tmp_path):
    files = write(tmp_path)
    for path in files: Image.fromarray(np.ones((32, 32), np.uint8)).save(mask_of(path))
    class Zero(nn.Conv2d):
        def forward(self, x): return 0*super().forward(x)
    learn = quiet(segmentation_learner(loaders(files, None, mask=MaskBlock(["no", "yes"])), Zero(3, 1, 1), classes=1))
    decided = [learn.predict(files[0])[1], learn.predict_tiled(files[0], tile=16), learn.loss_func.decodes(learn.tta()[0]), learn.get_preds(with_decoded=True)[2]]
    assert all((mask == 1).all() for mask in decided)
    assert learn.evaluate()["mask_miou"] == 1 and SegmentationInterpretation.from_learner(learn).confusion_matrix()[1, 0] == 0

def test_the_threshold_of_the_loss_holds_in_tiles_too(tmp_path):
    files = write(tmp_path)
    for path in files: Image.fromarray(np.ones((32, 32), np.uint8)).save(mask_of(path))
    dls = loaders(files, None, mask=MaskBlock(["no", "yes"]))
    learn = quiet(segmentation_learner(dls, nn.Conv2d(3, 1, 1), classes=1, loss_func=MultiTaskLoss(nn.BCEWithLogitsLoss(), mask_mode="binary", threshold=.7)))
    probs = learn.predict(files[0])[2]
    for views in (None, "flip"):
        assert torch.equal(learn.predict_tiled(files[0], tile=16, overlap=0, views=views).long(), (probs[0] >= .7).long())

def test_multilabel_masks(files):
    learn = quiet(segmentation_learner(loaders(files, None, mask=TransformBlock(type_tfms=MaskStack.create)), "Unet", **SMALL))
    assert learn.task.mask == "multilabel" and learn.task.classes == 2
    learn.fit(1)
    probs, true, decoded = learn.get_preds(with_decoded=True)
    scores = [jaccard_score(true[:, i].flatten(), decoded[:, i].flatten()) for i in range(2)]
    assert learn.evaluate()["mask_miou"] == pytest.approx(np.mean(scores))
    learn.show_results()

def test_multilabel_labels(files):
    learn = quiet(segmentation_learner(loaders(files, "multi"), "Unet", aux_params={}, **SMALL))
    learn.fit(1)
    (_, probs), (_, true), (_, decoded) = learn.get_preds(with_decoded=True)
    assert torch.equal(decoded, (probs >= .5).long())
    assert learn.evaluate()["label_f1"] == pytest.approx(f1_score(true.long(), decoded, average="macro", zero_division=0))
    learn.show_results()

# mistakes are named before the first epoch

def test_aux_head_without_labels(files):
    with pytest.raises(ValueError, match="the data has none"): segmentation_learner(loaders(files, None), "Unet", aux_params={}, **SMALL)
    with pytest.raises(ValueError, match="the data has no label"): segmentation_learner(loaders(files, None), Unet(classes=3, aux_params=dict(classes=2), **SMALL))

def test_labels_without_aux_head(files):
    with pytest.raises(ValueError, match="aux_params"): segmentation_learner(loaders(files), "Unet", **SMALL)
    with pytest.raises(ValueError, match="aux_params"): segmentation_learner(loaders(files), Unet(classes=3, **SMALL))

def test_wrong_number_of_channels(files):
    with pytest.raises(ValueError, match="gives 5 mask channels.*3 classes"): segmentation_learner(loaders(files, None), Unet(classes=5, **SMALL))
    with pytest.raises(ValueError, match="4 label channels"): segmentation_learner(loaders(files), Unet(classes=3, aux_params=dict(classes=4), **SMALL))

def test_activation_is_not_applied_twice(files):
    with pytest.raises(ValueError, match="takes logits"): segmentation_learner(loaders(files), "Unet", aux_params=dict(activation="sigmoid"), **SMALL)

def test_mask_with_a_value_that_has_no_code(tmp_path):
    files = write(tmp_path)
    mask = np.array(Image.open(mask_of(files[3])))
    mask[5, 5] = 7
    Image.fromarray(mask).save(mask_of(files[3]))
    with pytest.raises(ValueError, match=r"3\.bmp.*value 7"): segmentation_learner(loaders(files), "Unet", aux_params={}, **SMALL)
    learn = quiet(segmentation_learner(loaders(files), "Unet", aux_params={}, check=0, **SMALL))  # found in the first epoch at the latest
    with pytest.raises(ValueError, match=r"3\.bmp.*value 7"): learn.fit(1)

def test_mask_of_another_size(tmp_path):
    files = write(tmp_path)
    Image.open(files[4]).resize((40, 36)).save(files[4])
    with pytest.raises(ValueError, match=r"4\.bmp.*\(36, 40\).*\(32, 32\)"): check_items(dls := loaders(files, item_tfms=Resize(24)), read_targets(dls))

def test_splitter_that_forgets(files):
    def forgetful(model): return [list(model.encoder.parameters()), list(model.decoder.parameters())]
    with pytest.raises(ValueError, match="segmentation_head"): segmentation_learner(loaders(files, None), "Unet", splitter=forgetful, **SMALL)

@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_stock_mixing_is_refused_and_leaves_nothing_behind(learn, mix):
    loss = learn.loss_func
    with pytest.raises(TypeError, match="cannot mix masks"): learn.fit(1, cbs=mix())
    assert learn.loss_func is loss
    learn.fit(1)

def test_a_plain_loss_of_the_mask_gets_what_fastai_asks_for(files):
    learn = quiet(segmentation_learner(loaders(files, None), "Unet", loss_func=nn.CrossEntropyLoss(), **SMALL))
    assert isinstance(learn.loss_func, MultiTaskLoss)
    probs, masks, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    logits = learn.model.eval()(learn.dls.valid.one_batch()[0])
    assert torch.allclose(losses, F.cross_entropy(logits, masks, reduction="none").mean((1, 2)), atol=1e-6)
    assert torch.equal(decoded, logits.argmax(1))

def test_splitter_covers_every_parameter_once():
    model = Unet(classes=3, aux_params=dict(classes=2), **SMALL)
    groups = segmentation_splitter(model)
    assert sorted(id(p) for g in groups for p in g) == sorted(id(p) for p in model.parameters()) and len(groups) == 3

# every architecture

@pytest.mark.parametrize("name", sorted(architectures))
def test_every_architecture_trains_and_predicts_a_pair(files, name):
    dls = loaders(files, item_tfms=Resize(64))
    encoder_name = "tu-vit_tiny_patch16_224" if name == "dpt" else "resnet18"  # DPT reads the blocks of a plain transformer
    learn = quiet(segmentation_learner(dls, name, encoder_name, encoder_weights=None, aux_params={}))
    assert len(learn.opt.param_lists) == 3
    learn.freeze()
    encoder = {k: v.clone() for k, v in learn.model.encoder.state_dict().items()}
    learn.fit(1)
    assert all(torch.equal(v, encoder[k]) for k, v in learn.model.encoder.state_dict().items())
    mask, label = learn.predict(files[0])[2]
    assert mask.shape == (3, 32, 32) and label.shape == (2,)

# interpretation

def test_interpretation_counts_what_scikit_learn_counts(learn):
    interp = SegmentationInterpretation.from_learner(learn)
    probs, true = predictions(learn)
    pred = probs.argmax(1)
    assert np.array_equal(interp.confusion_matrix(), confusion_matrix(true.flatten(), pred.flatten(), labels=range(3)))
    table = interp.per_class_iou()
    assert list(table.index) == [*CODES, "mean"] and table.loc["mean", "iou"] == pytest.approx(learn.evaluate()["mask_miou"])
    worst = interp.most_confused(1)[0]
    counts = interp.confusion_matrix() - np.diag(np.diag(interp.confusion_matrix()))
    assert worst[2] == counts.max()

def test_top_losses_by_either_head(pair, files):
    interp = SegmentationInterpretation.from_learner(pair)
    _, (_, label) = pair.get_preds()
    level = pair.get_preds()[0][1]
    values, order, items = interp.top_losses(by="label_loss", items=True)
    expected = -level.log()[torch.arange(2), label]
    assert torch.allclose(values, expected.sort(descending=True).values, atol=1e-4)
    assert [str(i) for i in items] == [str(files[4 + i]) for i in order]

# averaged weights, and runs that break off (more in test_runs.py)

class Steps(Callback):
    "The weights after every step"
    order = 200
    def before_fit(self): self.weights = []
    def after_step(self): self.weights.append([p.detach().clone() for p in self.learn.model.parameters()])

def test_average_of_weights(learn):
    learn.fit(2, 1e-2, cbs=[EMA(.6), steps := Steps()])
    average = steps.weights[0]
    for weights in steps.weights[1:]: average = [.6*a + .4*w for a, w in zip(average, weights)]
    for p, a in zip(learn.model.parameters(), average): assert torch.allclose(p, a, atol=1e-6)
    assert any((p - w).abs().max() > 1e-4 for p, w in zip(learn.model.parameters(), steps.weights[-1]))
    score = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))["mask_miou"]
    assert learn.evaluate()["mask_miou"] == pytest.approx(score)  # what was scored is what was kept

ENDS = [KeyboardInterrupt, RuntimeError, CancelEpochException, CancelFitException]

@pytest.mark.parametrize("training, error", [*((t, e) for t in (False, True) for e in ENDS), (False, CancelValidException), (True, CancelTrainException)])
def test_a_run_with_averaged_weights_that_breaks_off(alone, error, training):
    "Whatever ends it, and where: the optimiser goes on to train the learner's model"
    class Stop(Callback):
        def after_batch(self):
            if self.training == training and self.learn.epoch == 1: raise error("stop")
    model = alone.model
    with nullcontext() if "Cancel" in error.__name__ else pytest.raises(error): alone.fit(3, 1e-2, cbs=[EMA(.9), Stop()])
    assert alone.model is model
    before = [p.detach().clone() for p in model.parameters()]
    alone.fit(1, 1e-2)
    assert sum(not torch.equal(p, b) for p, b in zip(model.parameters(), before)) > len(before)/2

def test_a_model_that_the_optimiser_does_not_know(alone):
    alone.model = Unet(classes=3, **SMALL)
    with pytest.raises(ValueError, match="no weight of the model"): alone.fit(1)

def test_looking_changes_no_file_of_a_run(alone, files, tmp_path):
    class Stop(Callback):
        order = 200
        def after_epoch(self): raise KeyboardInterrupt
    alone.path = tmp_path
    writers = [Checkpoint(), SaveModelCallback("mask_miou"), CSVLogger(), EMA(.5)]
    alone.add_cbs(writers)
    with pytest.raises(KeyboardInterrupt): alone.fit(3, 1e-2, cbs=Stop())
    written = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    record, names, weights = list(alone.recorder.values), list(alone.recorder.metric_names), [p.clone() for p in alone.model.parameters()]
    alone.evaluate(); alone.evaluate(metrics=[mask_metric(foreground_acc)]); alone.get_preds(); alone.predict(files[0]); alone.tta()
    alone.show_results(); SegmentationInterpretation.from_learner(alone)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == written and len(written) == 3
    assert alone.recorder.values == record and alone.recorder.metric_names == names
    assert all(torch.equal(p, w) for p, w in zip(alone.model.parameters(), weights))
    alone.logger = lambda *_: None  # fastai's `CSVLogger` leaves itself there when a fit breaks off
    alone.fit(3, 1e-2)  # and the run goes on behind its first epoch
    assert len(alone.recorder.values) == 3 and alone.recorder.values[0] == record[0]

def test_predictions_leave_the_record_of_the_training(learn):
    learn.fit(1)
    values, losses = list(learn.recorder.values), list(learn.recorder.losses)
    learn.get_preds(); learn.validate(); learn.show_results()
    assert learn.recorder.values == values and learn.recorder.losses == losses

def test_memory_format():
    dls = shapes_dataloaders(n=4, n_valid=2, size=32, bs=2, labels=None)
    small = dict(encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8))
    weight = lambda model: model.decoder.blocks[0].conv1[0].weight
    learn = segmentation_learner(dls, Unet, "tu-resnet18", **small)
    assert weight(learn.model).is_contiguous(memory_format=torch.channels_last) and not weight(learn.model).is_contiguous()
    own = Unet("tu-resnet18", classes=4, **small)
    assert weight(segmentation_learner(dls, own).model).is_contiguous()
