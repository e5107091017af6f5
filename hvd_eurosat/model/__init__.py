"""The modified ResNet-50, which of its parts train, and its fast arithmetic. No file is read or written here."""
