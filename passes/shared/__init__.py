"""What several methods share. A pass may import these, never another pass."""
