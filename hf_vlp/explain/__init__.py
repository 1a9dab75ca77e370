"""What a model that is handed in looks at: maps over the picture, and how they are drawn."""
