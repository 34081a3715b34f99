"""The functions of a mixture of experts that `torch.compile` leaves alone.

Marking them imports `torch._dynamo`, which takes longer than all the rest of a model. So this file is imported only
where something else has imported that already; before that, nothing can have been compiled.
"""

import torch

from hsa_compile.model.layers import grouped_product

sliced = torch.compiler.disable(grouped_product.sliced)
pair_by_pair = torch.compiler.disable(grouped_product.pair_by_pair)
count_in_backward = torch.compiler.disable(grouped_product.count_in_backward)
