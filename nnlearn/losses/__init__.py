"""Losses: how far predictions are from targets, as one number per element or example.

Low-precision arguments are widened to float32 and the loss is returned in float32, or in float64 where an argument is.
Shapes must agree, as broadcasting hides mistakes. Masked entries cost 0 and get no gradient, whatever they hold.
"""

from nnlearn.losses.binary import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from nnlearn.losses.binary import sigmoid_focal_loss as sigmoid_focal_loss
from nnlearn.losses.classification import cross_entropy as cross_entropy
from nnlearn.losses.classification import poly_loss_cross_entropy as poly_loss_cross_entropy
from nnlearn.losses.classification import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from nnlearn.losses.classification import softmax_cross_entropy as softmax_cross_entropy
from nnlearn.losses.classification import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from nnlearn.losses.cosine import cosine_distance as cosine_distance
from nnlearn.losses.cosine import cosine_similarity as cosine_similarity
from nnlearn.losses.divergence import convex_kl_divergence as convex_kl_divergence
from nnlearn.losses.divergence import generalized_kl_divergence as generalized_kl_divergence
from nnlearn.losses.divergence import kl_divergence as kl_divergence
from nnlearn.losses.divergence import kl_divergence_with_log_targets as kl_divergence_with_log_targets
from nnlearn.losses.margin import hinge_loss as hinge_loss
from nnlearn.losses.margin import multiclass_hinge_loss as multiclass_hinge_loss
from nnlearn.losses.margin import multiclass_perceptron_loss as multiclass_perceptron_loss
from nnlearn.losses.margin import perceptron_loss as perceptron_loss
from nnlearn.losses.metrics import accuracy as accuracy
from nnlearn.losses.regression import absolute_error as absolute_error
from nnlearn.losses.regression import huber_loss as huber_loss
from nnlearn.losses.regression import l2_loss as l2_loss
from nnlearn.losses.regression import log_cosh as log_cosh
from nnlearn.losses.regression import mean_absolute_error as mean_absolute_error
from nnlearn.losses.regression import mean_squared_error as mean_squared_error
from nnlearn.losses.regression import squared_error as squared_error
from nnlearn.losses.smoothing import smooth_labels as smooth_labels
