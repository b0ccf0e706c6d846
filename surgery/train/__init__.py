"""Pretraining: a configuration becomes a run folder with a trained model in it.

    config file ──► config ──► data, model, rules, objective ──► run ──► checkpoints, log, model

Accelerate is the engine; no distributed code is written here. Heavy libraries are imported where
they are used, so that ``import surgery`` stays cheap.
"""
