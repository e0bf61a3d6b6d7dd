"""Networks for images: pixels in, logits out."""

from kerascompress.models.resnet import resnet, resnet20, resnet110

__all__ = ["resnet", "resnet20", "resnet110"]
