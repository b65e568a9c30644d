"""Who trains, with the same input and the same output."""
