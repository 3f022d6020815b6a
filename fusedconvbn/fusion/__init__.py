"""Whole models: `fuse(model)` and the backend of ``torch.compile``.

    api          fuse, unfuse
    report       explain
    fit          fit
    backend      the backend of torch.compile
    find         captures a whole model with example inputs, and makes its plan
    model        a fused model, which captures its graphs when it is called
    script       a fused model for TorchScript
    sequential   a chain built by hand

    capture      makes TorchDynamo capture a model's forward
    graph        one captured graph; the files below each do a part of it
    nodes        values, memory and arguments of nodes
    calls        recognises convolutions, batch norms, activations
    accesses     which nodes read and write the same memory
    checkpoints  checkpoints in a graph
    normal_form  brings a graph into one form
    handwritten  finds activations written by hand, for the normal form
    matcher      finds chains
    match        a chain that was found
    rewrite      replaces chains by calls of the operators
    pooling      replaces pools by ones that save less

    profile      measures what a graph saves for backward
    clock        estimates how long a step of a graph takes
    step         predicts the memory of a step, with
    chain_stand_in  what a chain allocates, and
    workspaces      what PyTorch's operators allocate inside,
    cuda_libraries  also on CUDA
    optimizers   the memory of optimizers
    plan         decides which maps are saved under a budget
    parts        the parts of a graph between chains
    layouts      which parts may run again in backward
    curve        the fastest plan for each budget
    segments     makes parts run again in backward
    calibration  measures how long recomputing them takes
    copies       copies of models
    progress     a progress bar

The operator's modules import nothing from here.
"""
