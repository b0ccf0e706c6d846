"""Fast adaptation: a model is meta-trained so that a few gradient steps fit it to a new task.

config ──► episodes ──► model, rules ──► inner loop (inner) ──► meta-gradient (estimators) ──► run
"""
