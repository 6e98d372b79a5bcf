"""Out-of-distribution detection: scores, and how well they tell images apart."""
