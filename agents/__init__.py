"""THE LEARNERS: reach any environment through reset/step."""
