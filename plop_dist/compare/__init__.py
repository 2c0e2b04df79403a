"""Does the placement pay on this model and data, at equal size and at the best rate of each?"""
