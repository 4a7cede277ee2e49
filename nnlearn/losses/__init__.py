"""Losses: the error of predictions against targets, one value per element or example.

Low-precision arguments are widened to float32, and the loss is float32, or float64 if an argument is. Shapes must be
equal, because broadcasting hides mistakes. Masked entries have loss 0 and no gradient, even if they are NaN.
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
from nnlearn.losses.contrastive import info_nce_loss as info_nce_loss
from nnlearn.losses.contrastive import ntxent as ntxent
from nnlearn.losses.contrastive import sigmoid_pair_loss as sigmoid_pair_loss
from nnlearn.losses.contrastive import supervised_contrastive_loss as supervised_contrastive_loss
from nnlearn.losses.cosine import cosine_distance as cosine_distance
from nnlearn.losses.cosine import cosine_similarity as cosine_similarity
from nnlearn.losses.ctc import ctc_loss as ctc_loss
from nnlearn.losses.ctc_decoding import Decoded as Decoded
from nnlearn.losses.ctc_decoding import ctc_beam_search_decode as ctc_beam_search_decode
from nnlearn.losses.ctc_decoding import ctc_greedy_decode as ctc_greedy_decode
from nnlearn.losses.divergence import convex_kl_divergence as convex_kl_divergence
from nnlearn.losses.divergence import generalized_kl_divergence as generalized_kl_divergence
from nnlearn.losses.divergence import kl_divergence as kl_divergence
from nnlearn.losses.divergence import kl_divergence_with_log_targets as kl_divergence_with_log_targets
from nnlearn.losses.error_rates import character_error_rate as character_error_rate
from nnlearn.losses.error_rates import edit_distance as edit_distance
from nnlearn.losses.error_rates import word_error_rate as word_error_rate
from nnlearn.losses.fenchel_young import make_fenchel_young_loss as make_fenchel_young_loss
from nnlearn.losses.likelihood import gaussian_kl_divergence as gaussian_kl_divergence
from nnlearn.losses.likelihood import gaussian_negative_log_likelihood as gaussian_negative_log_likelihood
from nnlearn.losses.likelihood import negative_evidence_lower_bound as negative_evidence_lower_bound
from nnlearn.losses.likelihood import poisson_negative_log_likelihood as poisson_negative_log_likelihood
from nnlearn.losses.likelihood import quantile_loss as quantile_loss
from nnlearn.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from nnlearn.losses.margin import hinge_loss as hinge_loss
from nnlearn.losses.margin import multiclass_hinge_loss as multiclass_hinge_loss
from nnlearn.losses.margin import multiclass_perceptron_loss as multiclass_perceptron_loss
from nnlearn.losses.margin import perceptron_loss as perceptron_loss
from nnlearn.losses.metrics import accuracy as accuracy
from nnlearn.losses.overlap import binary_dice_loss as binary_dice_loss
from nnlearn.losses.overlap import dice_loss as dice_loss
from nnlearn.losses.overlap import iou_loss as iou_loss
from nnlearn.losses.overlap import multiclass_generalized_dice_loss as multiclass_generalized_dice_loss
from nnlearn.losses.overlap import tversky_loss as tversky_loss
from nnlearn.losses.ranking import list_mle_loss as list_mle_loss
from nnlearn.losses.ranking import margin_ranking_loss as margin_ranking_loss
from nnlearn.losses.ranking import pairwise_logistic_loss as pairwise_logistic_loss
from nnlearn.losses.ranking import ranking_softmax_loss as ranking_softmax_loss
from nnlearn.losses.regression import absolute_error as absolute_error
from nnlearn.losses.regression import huber_loss as huber_loss
from nnlearn.losses.regression import l2_loss as l2_loss
from nnlearn.losses.regression import log_cosh as log_cosh
from nnlearn.losses.regression import mean_absolute_error as mean_absolute_error
from nnlearn.losses.regression import mean_squared_error as mean_squared_error
from nnlearn.losses.regression import squared_error as squared_error
from nnlearn.losses.smoothing import smooth_labels as smooth_labels
from nnlearn.losses.sparsemax import multiclass_sparsemax_loss as multiclass_sparsemax_loss
from nnlearn.losses.sparsemax import sparsemax as sparsemax
from nnlearn.losses.sparsemax import sparsemax_loss as sparsemax_loss
from nnlearn.losses.triplet import batch_hard_triplet_loss as batch_hard_triplet_loss
from nnlearn.losses.triplet import triplet_margin_loss as triplet_margin_loss
