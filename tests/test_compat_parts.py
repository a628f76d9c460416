"""Parts of a model that were replaced by hand run on segkit as on SMP: the same weights, the same mask."""
from importlib import import_module

import pytest
import torch
from torch import nn

TOPS = ("segmentation_models_pytorch", "segkit.compat.smp")
IMAGE = torch.randn(1, 3, 64, 64)


class Wrapped(nn.Module):
    "An encoder of one's own making: what decoders read, and no more"
    def __init__(self, encoder):
        super().__init__()
        self.inner, self.out_channels, self.output_stride = encoder, encoder.out_channels, encoder.output_stride

    def forward(self, x): return self.inner(x)


class Block(nn.Module):
    "Written for SMP 0.6: height and width as numbers"
    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels + skip_channels, out_channels, 1)

    def forward(self, feature_map, target_height, target_width, skip_connection=None):
        x = nn.functional.interpolate(feature_map, size=(target_height, target_width))
        return self.conv(torch.cat([x, skip_connection], dim=1) if skip_connection is not None else x)


def conv(channels): return nn.Conv2d(channels, 64, 7, 2, 3, bias=False)


def head(smp, model): model.segmentation_head = nn.Conv2d(16, 5, 1)
def head_of_smp(smp, model): model.segmentation_head = smp.base.SegmentationHead(16, 2, kernel_size=1, activation="sigmoid")
def head_inside(smp, model): model.segmentation_head[0], model.segmentation_head[-1] = nn.Conv2d(16, 3, 1), nn.Sigmoid()
def label(smp, model): model.classification_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 7))
def more_channels(smp, model): model.encoder.conv1 = conv(6)
def one_channel(smp, model): model.encoder.conv1 = conv(1)
def no_pooling_norm(smp, model): model.encoder.bn1 = nn.GroupNorm(8, 64)
def another_encoder(smp, model): model.encoder = smp.encoders.get_encoder("resnet34")
def wrapped(smp, model): model.encoder = Wrapped(model.encoder)
def block(smp, model): model.decoder.blocks[1] = smp.decoders.unet.decoder.UnetDecoderBlock(256, 128, 128)


def decoder(smp, model):
    model.decoder = smp.decoders.unet.decoder.UnetDecoder(encoder_channels=model.encoder.out_channels, decoder_channels=(32, 16, 16, 16, 16), n_blocks=5)
    model.decoder.blocks[0], model.decoder.blocks[4] = Block(512, 256, 32), Block(16, 0, 16)


REPLACED = [head, head_of_smp, head_inside, label, more_channels, one_channel, no_pooling_norm, another_encoder, wrapped, block, decoder]


@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_replaced(replace):
    image = {"more_channels": IMAGE.repeat(1, 2, 1, 1), "one_channel": IMAGE[:, :1]}.get(replace.__name__, IMAGE)
    models = []
    for smp in map(import_module, TOPS):
        models.append(smp.Unet("resnet18", encoder_weights=None))
        replace(smp, models[-1])
    theirs, ours = models
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad(): torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), rtol=1e-4, atol=1e-5)
    with torch.no_grad(): torch.testing.assert_close(ours.predict(image), theirs.predict(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "PAN", "UPerNet", "Segformer"])
def test_more_channels_in_every_architecture(name):
    import segkit
    model = getattr(segkit, name)("resnet18", encoder_weights=None).eval()
    model.encoder.conv1 = conv(4)
    with torch.no_grad(): assert model(torch.randn(1, 4, 65, 70)).shape[2:] == (65, 70)
    with pytest.raises(ValueError, match="takes images with 3 channels, got 5"): model(torch.randn(1, 5, 64, 64))


def test_more_channels_traced_and_exported():
    import segkit
    model = segkit.Unet("resnet18", encoder_weights=None).eval()
    model.encoder.conv1 = conv(4)
    image = torch.randn(1, 4, 64, 64)
    with torch.no_grad(): expected = model(image)
    torch.testing.assert_close(torch.jit.trace(model, image)(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,), strict=False).module()(image), expected)


def test_class_of_a_notebook():
    "It cannot be read again, so it is not written, and the error says what to do"
    import segkit
    scope = {"__name__": "__main__", "Unet": segkit.Unet}
    exec("class Mine(Unet): pass", scope)
    with pytest.raises(ValueError, match="Mine cannot be saved.*move the class into a module"): scope["Mine"]("resnet18", encoder_weights=None).save_pretrained("nowhere")
