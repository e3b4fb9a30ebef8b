"""Losses per example, their output errors, and reductions over the batch.

The *output error* of an example is the gradient of its loss with respect to its outputs. What a rule is given, e, is
the gradient of the objective with respect to the outputs of the whole batch:

    mean            J = 1/n sum_i L_i                    e_i = 1/n dL_i/do_i
    weighted mean   J = sum_i w_i L_i / sum_i w_i        e_i = w_i / sum(w) dL_i/do_i      (a mask: w_i in {0, 1})
    sum             J = sum_i L_i                        e_i = dL_i/do_i
"""

import numpy as np


def one_hot(labels, classes):
    """Integer labels [batch] -> [batch, classes]."""
    return np.eye(classes)[np.asarray(labels)]


def softmax(outputs):
    """[batch, classes] -> probabilities."""
    powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def softmax_cross_entropy(outputs, targets):
    """L = -sum_k t_k log softmax(o)_k; dL/do = softmax(o) sum(t) - t. Targets [batch, classes] -> ([batch], error)."""
    outputs, targets = np.asarray(outputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    error = softmax(outputs) * targets.sum(axis=-1, keepdims=True) - targets
    return -(targets * log_probabilities).sum(axis=-1), error


def sigmoid_cross_entropy(outputs, targets):
    """L = sum_k log(1 + exp(o_k)) - t_k o_k; dL/do = sigmoid(o) - t. Targets [batch, outputs] in [0, 1]."""
    outputs, targets = np.asarray(outputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    loss = (np.logaddexp(outputs, 0) - targets * outputs).sum(axis=-1)
    return loss, 0.5 * (1 + np.tanh(outputs / 2)) - targets


def half_squared_error(outputs, targets):
    """L = 1/2 sum_k (o_k - t_k)^2; dL/do = o - t."""
    difference = np.asarray(outputs, dtype=np.float64) - np.asarray(targets, dtype=np.float64)
    return 0.5 * (difference**2).sum(axis=-1), difference


def mean(losses, errors):
    """([batch], [batch, outputs]) -> (objective, e) of the batch mean."""
    return losses.mean(), errors / losses.shape[0]


def weighted_mean(losses, errors, weights):
    """(objective, e) of the mean weighted with `weights` [batch]; zeros mask examples out."""
    weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return (weights * losses).sum(), weights[:, None] * errors
