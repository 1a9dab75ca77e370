"""What leaves the house: model cards and uploads."""
