"""The flow: prepare, finetune, prune, distill, evaluate, register; around it resolve, promote, conclude.

A stage imports no other stage: stages meet only through directories on disk. It imports every room but cluster and cli.
"""
