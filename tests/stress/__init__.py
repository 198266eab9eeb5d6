"""Attacks on the promises: kills, fuzzing, clients that go away."""
