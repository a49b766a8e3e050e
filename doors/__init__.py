"""Doors to other systems: one room for each format in which Llamas are kept elsewhere.

Every room offers the same, so that convert.py can lead from any door to any other:

    KIND                            its name
    recognises(path) -> bool        a quick look at names and first bytes
    open_weights(path, …)           the model, its tensors still in their files (weights.Weights)
    problems(source, …) -> [str]    what this format cannot hold of it, and why
    remarks(source, …) -> [str]     what its owner should hear of
    size(source, …) -> int          bytes that its files will take, about
    write(source, out, …)           write them, one tensor in memory at a time
    expected(source, name, tensor, …)   what reading a tensor back must give: itself, unless the format rounds

Inside the house, between the doors, everything has Hugging Face's names and layout.
"""
