"""One of the processes of `test_distributed.py`: trains, and writes what came out. `python two_processes.py FOLDER`"""
import json
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import num_distrib, rank_distrib

import segkit
from segkit.core.registry import architectures
from segkit.data.shapes import shapes_dataloaders
from segkit.learner import Checkpoint, segmentation_learner
from segkit.losses import MultiTaskLoss

N, VALID, PER_PROCESS = 8, 7, 2

class Seen(Callback):
    "Notes the loss of each batch"
    def before_fit(self): self.losses = []
    def after_loss(self):
        if self.training: self.losses.append(self.learn.loss.item())

def learner(folder, **kwargs):
    "The same weights and the same batches, split or whole"
    torch.manual_seed(0)
    together = max(1, num_distrib())
    dls = shapes_dataloaders(n=N, n_valid=VALID, size=32, bs=2*PER_PROCESS//together)
    half = N//2  # process 0 gets the first half of the items; one process takes two of each half at a time
    order = list(range(N)) if together > 1 else [i for k in range(0, half, 2) for i in (k, k + 1, half + k, half + k + 1)]
    dls.train.shuffle_fn = lambda indices: order
    loss = MultiTaskLoss(torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(), "uncertainty")
    learn = segmentation_learner(dls, "Unet", "tu-convnext_atto", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 16),
                                 aux_params={"dropout": 0.}, decoder_use_norm="groupnorm", loss_func=loss, path=folder, **kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn

def same_as_one(folder):
    learn = learner(folder)
    with learn.distrib_ctx(): learn.fit(2, 1e-3, cbs=[seen := Seen()])
    weights = {k: v.double().abs().sum().item() for k, v in [*learn.model.named_parameters(), *learn.loss_func.named_parameters()]}
    names = learn.recorder.metric_names[1:-1]
    return {"losses": seen.losses, "weights": weights, "scores": dict(zip(names, learn.recorder.values[-1])), "training": isinstance(learn.model, segkit.Unet)}

class Stop(Callback):
    order = 120  # after the checkpoint
    def after_epoch(self):
        if self.epoch == 0: raise KeyboardInterrupt

def interrupted(folder):
    learn = learner(folder)
    try:
        with learn.distrib_ctx(): learn.fit(2, 1e-3, cbs=[Checkpoint(), Stop()])
    except KeyboardInterrupt: pass
    learn = learner(folder)
    with learn.distrib_ctx(): learn.fit(2, 1e-3, cbs=[Checkpoint(), seen := Seen()])
    return {"losses": seen.losses}

def every_architecture():
    "Two steps each; `DistributedDataParallel` refuses the second if a parameter had no gradient in the first"
    done, loss = [], MultiTaskLoss(torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss())
    for name in sorted(architectures):
        torch.manual_seed(0)
        encoder, size = ("tu-vit_tiny_patch16_224", 224) if name == "dpt" else ("resnet18", 64)
        model = segkit.create_model(name, encoder, encoder_weights=None, classes=3, aux_params={"classes": 2})
        model = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2): loss(model(torch.randn(1, 3, size, size)), torch.zeros(1, size, size).long(), torch.zeros(1).long()).backward()
        done.append(name)
    return done

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = same_as_one(folder)
    if num_distrib(): result |= {"resumed": interrupted(folder)["losses"], "architectures": every_architecture()}
    (folder/f"{num_distrib()}-{rank_distrib()}.json").write_text(json.dumps(result))
