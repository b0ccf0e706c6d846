"""Fine-tuning: a pretrained model, a rule file and data become a run folder.

config ──► data ──► pretrained model, head, rules ──► run (surgery.train.run) ──► model, adapter
"""
