"""From manifests to batches of training."""
