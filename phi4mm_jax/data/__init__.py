"""Data: from manifests to training batches."""
