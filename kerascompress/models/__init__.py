"""Networks for images: pixels in, logits out."""

from kerascompress.models.mobilenet_v2 import mobilenet_v2
from kerascompress.models.resnet import resnet, resnet20, resnet110
from kerascompress.models.shufflenet_v2 import shufflenet_v2

__all__ = ["mobilenet_v2", "resnet", "resnet20", "resnet110", "shufflenet_v2"]
