"""What remembers earlier steps: a teacher that follows the model, and a queue of its features."""
