"""The network that makes images out of noise, for students that may see no real ones."""

from torch import Tensor, nn

SHRINK = 4  # a side of the images over a side of the first maps
WIDTH = 128  # channels of the first maps


class Generator(nn.Module):
    """Noise into images, which come out as a network reads them: about mean 0 and variance 1 in every channel.

    Micaelli, Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019, arXiv:1905.09768.

    A linear layer to 128 maps of a quarter of the sides and a batch norm; twice: doubled by nearest neighbours, 3x3
    convolution (to 128 and to 64 channels), batch norm, leaky ReLU of slope 0.2; a 3x3 convolution to the image's
    channels and, last, a batch norm. All layers have biases. For 32 x 32 pixels in colour and 100 numbers of noise
    these are 1,051,145 parameters. Initial weights as in `models.build_model`, from torch's global generator.
    """

    def __init__(self, channels: int, image_size: int | tuple[int, int], noise: int = 100) -> None:
        """`image_size` is the side of the images, or (height, width). ValueError unless sides are multiples of 4."""
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for what, value in (("channels", channels), ("noise", noise)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        if any(side < SHRINK or side % SHRINK for side in sides):
            raise ValueError(
                f"image_size must be a multiple of {SHRINK} for a generator, not {' x '.join(map(str, sides))}"
            )
        self.noise = noise
        height, width = (side // SHRINK for side in sides)
        self.layers = nn.Sequential(
            nn.Linear(noise, WIDTH * height * width),
            nn.Unflatten(1, (WIDTH, height, width)),
            nn.BatchNorm2d(WIDTH),
            *_doubled(WIDTH, WIDTH),
            *_doubled(WIDTH, WIDTH // 2),
            nn.Conv2d(WIDTH // 2, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, noise: Tensor) -> Tensor:
        """Images (B, channels, height, width), normalised, from standard normal noise (B, `noise`)."""
        return self.layers(noise)


def _doubled(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """Maps of twice the sides."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)
