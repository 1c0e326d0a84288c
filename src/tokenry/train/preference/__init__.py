"""preference: pairs, their losses, and the trainers on them."""
