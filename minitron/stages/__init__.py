"""The flow: prepare, finetune, prune, distill, evaluate, register; around it resolve, promote, conclude.

A stage imports no other stage: stages share only directories on disk. This room imports every room but cluster and cli.
"""
