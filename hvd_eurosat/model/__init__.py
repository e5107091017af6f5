"""The modified ResNet-50, its weights, and which of them train."""
