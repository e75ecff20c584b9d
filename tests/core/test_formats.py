"""Lines of many loops and frameworks, written by hand as those print them: what is read of each, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chiplog.ledger.parse import parse_log

# ruff: noqa: E501
# Of each: lines, and what they say. A figure that is not named here must not be claimed.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "pytorch mnist": (
        "Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.305194\n"
        "Train Epoch: 2 [640/60000 (1%)]\tLoss: 0.412317\n\n"
        "Test set: Average loss: 0.0471, Accuracy: 9845/10000 (98%)\n\n",
        {"epoch": 2.0, "loss_first": 2.305194, "loss_last": 0.412317},
    ),
    "pytorch imagenet": (
        "Epoch: [0][  10/5005]\tTime  0.52 ( 1.21)\tData  0.01 ( 0.40)\tLoss 7.0e+00 (7.1e+00)\tAcc@1   0.00 (  0.10)\n"
        "Epoch: [0][  20/5005]\tTime  0.50 ( 0.86)\tData  0.01 ( 0.21)\tLoss 6.9e+00 (7.0e+00)\tAcc@1   0.39 (  0.12)\n",
        {"epoch": 0.0, "steps": 20, "steps_planned": 5005, "loss_first": 7.0, "loss_last": 6.9, "steps_per_s": 2.0},
    ),
    "word language model": (
        "| epoch   1 |   200/ 2983 batches | lr 20.00 | ms/batch 31.50 | loss  7.63 | ppl  2052.88\n"
        "| epoch   1 |   400/ 2983 batches | lr 20.00 | ms/batch 30.50 | loss  6.85 | ppl   944.92\n",
        {"epoch": 1.0, "steps": 400, "steps_planned": 2983, "loss_first": 7.63, "loss_last": 6.85, "steps_per_s": 1 / 0.0305},
    ),
    "nanogpt": (
        "step 0: train loss 10.9, val loss 10.8\niter 0: loss 10.8991, time 30120.10ms, mfu -100.00%\n"
        "iter 10: loss 9.4500, time 250.00ms, mfu 30.10%\niter 20: loss 8.7500, time 250.00ms, mfu 30.20%\n",
        {"steps": 20, "loss_first": 10.9, "loss_last": 8.75, "steps_per_s": 4.0, "val_losses": [10.8]},
    ),
    "open_clip": (
        "2024-01-02,03:04:05 | INFO | Train Epoch: 0 [  2048/1000000 (0%)] Data (t): 2.1 Batch (t): 3.0, 682/s, 85/s/gpu LR: 0.000001 Logit Scale: 14.286 Contrastive_loss: 8.3200 (8.32) Loss: 8.3200 (8.32)\n"
        "2024-01-02,03:05:05 | INFO | Train Epoch: 0 [206848/1000000 (21%)] Data (t): 0.1 Batch (t): 0.6, 3413/s, 426/s/gpu LR: 0.000100 Logit Scale: 14.280 Contrastive_loss: 7.1000 (7.7) Loss: 7.1000 (7.7)\n",
        {"epoch": 0.0, "loss_first": 8.32, "loss_last": 7.1},
    ),
    "mmdetection 2": (
        "2023-05-06 07:08:09,101 - mmdet - INFO - Epoch [1][50/7330]\tlr: 1.978e-03, eta: 1 day, 2:03:04, time: 0.500, data_time: 0.050, memory: 3772, loss_rpn_cls: 0.3, loss: 2.1000\n"
        "2023-05-06 07:08:34,101 - mmdet - INFO - Epoch [1][100/7330]\tlr: 3.976e-03, eta: 1 day, 1:00:00, time: 0.500, data_time: 0.010, memory: 3772, loss_rpn_cls: 0.2, loss: 1.5000\n",
        {"epoch": 1.0, "steps": 100, "steps_planned": 7330, "loss_first": 2.1, "loss_last": 1.5, "steps_per_s": 2.0},
    ),
    "detectron2": (
        "[01/02 03:04:05 d2.utils.events]:  eta: 1:00:00  iter: 19  total_loss: 2.5  loss_cls: 1.5  loss_box_reg: 0.5  time: 0.5000  data_time: 0.0100  lr: 0.0003  max_mem: 4510M\n"
        "[01/02 03:04:15 d2.utils.events]:  eta: 0:59:50  iter: 39  total_loss: 1.75  loss_cls: 1.0  loss_box_reg: 0.5  time: 0.5000  data_time: 0.0100  lr: 0.0005  max_mem: 4600M\n",
        {"steps": 39, "loss_first": 2.5, "loss_last": 1.75, "steps_per_s": 2.0, "peak_mem_bytes": 4600 << 20},
    ),
    "metric logger": (
        "Epoch: [0]  [   0/1562]  eta: 1:02:03  lr: 0.000000  loss: 7.0 (7.0)  time: 2.4  data: 1.2  max mem: 11000\n"
        "Epoch: [0]  [  10/1562]  eta: 0:12:03  lr: 0.000001  loss: 6.5 (6.8)  time: 0.5  data: 0.0  max mem: 11482\n",
        {"epoch": 0.0, "steps": 10, "steps_planned": 1562, "loss_first": 7.0, "loss_last": 6.5, "peak_mem_bytes": 11482 << 20, "steps_per_s": 2.0},
    ),
    "timm": (
        "Train: 0 [   0/1251 (  0%)]  Loss: 6.95 (6.95)  Time: 4.250s,  240.94/s  (4.250s,  240.94/s)  LR: 1.000e-06  Data: 1.2 (1.2)\n"
        "Train: 0 [  50/1251 (  4%)]  Loss: 6.93 (6.94)  Time: 0.500s, 2048.00/s  (0.600s, 1706.66/s)  LR: 1.000e-06  Data: 0.0 (0.1)\n",
        {"epoch": 0.0, "steps": 50, "steps_planned": 1251, "loss_first": 6.95, "loss_last": 6.93, "steps_per_s": 2.0},
    ),
    "caffe": (
        "I0102 03:04:05.101 123 solver.cpp:239] Iteration 0 (0 iter/s, 0.5s/100 iters), loss = 2.35\n"
        "I0102 03:04:25.101 123 solver.cpp:239] Iteration 100 (5.0 iter/s, 20.0s/100 iters), loss = 1.25\n"
        "I0102 03:04:25.101 123 solver.cpp:258]     Train net output #0: loss = 1.20 (* 1 = 1.20 loss)\n",
        {"steps": 100, "loss_first": 2.35, "loss_last": 1.25, "steps_per_s": 5.0},
    ),
    "darknet": (
        "1: 1043.5, 1043.5 avg loss, 0.000000 rate, 3.20 seconds, 64 images, -1 hours left\n",
        {},
    ),
    "yolov5": (
        "     Epoch   gpu_mem       box       obj       cls    labels  img_size\n"
        "     3/299     2.1G    0.0512    0.0311    0.0210       110       640: 100%|##########| 200/200 [00:40<00:00,  5.00it/s]\n",
        {"epoch": 3.0, "epochs": 299, "mean_steps_per_s": 5.0, "resumed_from": 0},
    ),
    "tf estimator": (
        "INFO:tensorflow:loss = 2.5, step = 0\nINFO:tensorflow:global_step/sec: 5.0\n"
        "INFO:tensorflow:loss = 1.5, step = 100 (20.000 sec)\n",
        {"steps": 100, "loss_first": 2.5, "loss_last": 1.5, "steps_per_s": 5.0},
    ),
    "slim": (
        "INFO:tensorflow:global step 10: loss = 3.5 (0.500 sec/step)\nINFO:tensorflow:global step 20: loss = 3.25 (0.500 sec/step)\n",
        {"steps": 20, "loss_first": 3.5, "loss_last": 3.25, "steps_per_s": 2.0},
    ),
    "paddlenlp": (
        "[2024-01-02 03:04:05,101] [    INFO] - global step 10, epoch: 1, batch: 9, loss: 0.75, speed: 2.00 step/s\n"
        "[2024-01-02 03:04:10,101] [    INFO] - global step 20, epoch: 1, batch: 19, loss: 0.5, speed: 2.00 step/s\n",
        {"epoch": 1.0, "steps": 20, "loss_first": 0.75, "loss_last": 0.5, "steps_per_s": 2.0},
    ),
    "paddledetection": (
        "[01/02 03:04:05] ppdet.engine INFO: Epoch: [0] [  0/100] learning_rate: 0.0 loss_xy: 1.2 loss: 90.5 eta: 1:00:00 batch_cost: 0.5000 data_cost: 0.1 ips: 16.0 images/s\n"
        "[01/02 03:04:15] ppdet.engine INFO: Epoch: [0] [ 20/100] learning_rate: 0.0 loss_xy: 1.1 loss: 60.5 eta: 1:00:00 batch_cost: 0.5000 data_cost: 0.1 ips: 16.0 images/s\n",
        {"epoch": 0.0, "steps": 20, "steps_planned": 100, "loss_first": 90.5, "loss_last": 60.5, "steps_per_s": 2.0},
    ),
    "flair": (
        "2024-01-02 03:04:05,101 epoch 1 - iter 10/100 - loss 2.5 - time (sec): 5.00 - samples/sec: 64.0 - lr: 0.1 - momentum: 0.0\n"
        "2024-01-02 03:04:10,101 epoch 1 - iter 20/100 - loss 2.0 - time (sec): 10.00 - samples/sec: 64.0 - lr: 0.1 - momentum: 0.0\n",
        {"epoch": 1.0, "steps": 20, "steps_planned": 100, "loss_first": 2.5, "loss_last": 2.0, "steps_per_s": 2.0},
    ),
    "tacotron2": (
        "Epoch: 0\nTrain loss 0 31.25 Grad Norm 4.2 2.00s/it\nTrain loss 1 28.50 Grad Norm 4.0 2.00s/it\n",
        {"epoch": 0.0, "loss_first": 31.25, "loss_last": 28.5, "steps_per_s": 0.5},
    ),
    "hifi-gan": (
        "Epoch: 1\nSteps : 5, Gen Loss Total : 90.125, Mel-Spec. Error : 1.700, s/b : 0.500\nSteps : 10, Gen Loss Total : 80.500, Mel-Spec. Error : 1.500, s/b : 0.500\n",
        {"epoch": 1.0, "steps": 10, "loss_first": 90.125, "loss_last": 80.5},
    ),
    "coqui": (
        "\n > EPOCH: 0/100\n > TRAINING (2024-01-02 03:04:05)\n   --> STEP: 24/98 -- GLOBAL_STEP: 25\n     | > loss: 3.25  (3.5)\n     | > step_time: 0.50  (0.55)\n     | > loader_time: 0.01  (0.01)\n",
        {"epoch": 0.0, "epochs": 100, "steps": 25, "loss_first": 3.25, "loss_last": 3.25, "steps_per_s": 2.0},
    ),
    "stylegan": (
        "tick 0     kimg 0.1      time 40s          sec/tick 10.0    sec/kimg 100.00  maintenance 30.0   cpumem 4.50   gpumem 20.30  reserved 20.5   augment 0.000\n"
        "tick 1     kimg 4.1      time 2m 20s       sec/tick 100.0   sec/kimg 25.00   maintenance 0.0    cpumem 4.60   gpumem 10.20  reserved 10.9   augment 0.010\n",
        {},
    ),
    "openai diffusion": (
        "-------------------------\n| grad_norm  | 1.5      |\n| loss       | 0.75     |\n| loss_q0    | 0.9      |\n| mse        | 0.7      |\n| samples    | 1280     |\n| step       | 10       |\n-------------------------\n"
        "-------------------------\n| grad_norm  | 1.0      |\n| loss       | 0.5      |\n| loss_q0    | 0.8      |\n| mse        | 0.4      |\n| samples    | 2560     |\n| step       | 20       |\n-------------------------\n",
        {"steps": 20, "loss_first": 0.75, "loss_last": 0.5},
    ),
    "diffusers": (
        "03/04/2024 05:06:07 - INFO - __main__ - ***** Running training *****\n"
        "03/04/2024 05:06:07 - INFO - __main__ -   Num examples = 833\n03/04/2024 05:06:07 - INFO - __main__ -   Num Epochs = 5\n"
        "03/04/2024 05:06:07 - INFO - __main__ -   Instantaneous batch size per device = 4\n"
        "03/04/2024 05:06:07 - INFO - __main__ -   Total optimization steps = 1000\n"
        "Steps:   0%|          | 0/1000 [00:00<?, ?it/s]Steps:   1%|          | 10/1000 [00:20<33:00,  2.00s/it, lr=1e-5, step_loss=0.125]",
        {"steps": 10, "steps_planned": 1000, "loss_last": 0.125, "loss_first": 0.125, "train_s": 20.0, "mean_steps_per_s": 0.5, "epochs": 5, "micro_batch_size": 4, "n_samples": 833, "resumed_from": 0},
    ),
    "fastai": (
        "epoch     train_loss  valid_loss  accuracy  time    \n0         0.750000    0.500000    0.810000  01:40     \n1         0.500000    0.400000    0.850000  01:40     \n",
        {"epoch": 1.0, "loss_first": 0.75, "loss_last": 0.5, "val_losses": [0.5, 0.4], "train_s": 200.0},
    ),
    "catboost": (
        "0:\tlearn: 0.6800000\ttest: 0.6900000\tbest: 0.6900000 (0)\ttotal: 50ms\tremaining: 4.95s\n"
        "50:\tlearn: 0.4500000\ttest: 0.5000000\tbest: 0.5000000 (50)\ttotal: 2.5s\tremaining: 2.4s\n",
        {"steps": 50},
    ),
    "xgboost": (
        "[0]\ttrain-logloss:0.60000\teval-logloss:0.65000\n[10]\ttrain-logloss:0.30000\teval-logloss:0.45000\n",
        {"steps": 10, "loss_first": 0.6, "loss_last": 0.3},
    ),
    "cleanrl": (
        "global_step=1000, episodic_return=[20.]\nSPS: 500\nglobal_step=2000, episodic_return=[25.]\nSPS: 500\n",
        {"steps": 2000},
    ),
    "rsl_rl": (
        "#" * 80 + "\n                      \x1b[1m Learning iteration 10/1500 \x1b[0m\n\n"
        "                       Computation: 50000 steps/s (collection: 1.5s, learning 0.5s)\n"
        "               Value function loss: 0.0125\n                    Surrogate loss: -0.0050\n"
        "                       Mean reward: 12.50\n"
        "                   Total timesteps: 1081344\n                    Iteration time: 2.00s\n"
        "                        Total time: 22.00s\n                               ETA: 2980.0s\n",
        {"steps": 10, "steps_planned": 1500, "train_s": 22.0, "mean_steps_per_s": 10 / 22, "steps_per_s": 0.5},
    ),
    "rl_games": (
        "fps step: 50000 fps step and policy inference: 40000 fps total: 30000 epoch: 1/500 frames: 0\n"
        "fps step: 50000 fps step and policy inference: 40000 fps total: 30000 epoch: 20/500 frames: 622592\n",
        {"epoch": 20.0, "epochs": 500},
    ),
    "torchtitan": (
        "[rank0]:[titan] 2025-01-02 03:04:05,101 - root - INFO - step:  1  loss: 12.25  grad_norm:  4.0  memory: 20.50GiB(25.9%)  tps: 1,000  tflops: 10.0  mfu: 1.0%\n"
        "[rank0]:[titan] 2025-01-02 03:04:25,101 - root - INFO - step: 11  loss:  8.75  grad_norm:  2.0  memory: 30.25GiB(38.2%)  tps: 8,000  tflops: 80.0  mfu: 8.0%\n",
        {"steps": 11, "loss_first": 12.25, "loss_last": 8.75, "tokens_per_s": 8000.0, "steps_per_s": 0.5, "peak_mem_bytes": 30.25 * 2**30},
    ),
    "nanotron": (
        "01/02/2025 03:04:05 [INFO|DP=0|PP=0|TP=0]: iteration: 10 / 1000 | consumed_tokens: 1.3M | elapsed_time_per_iteration_ms: 500 | tokens_per_sec: 262K | tokens_per_sec_per_gpu: 32.8K | global_batch_size: 64 | lm_loss: 9.5 | lr: 0.0001 | model_tflops_per_gpu: 100\n"
        "01/02/2025 03:04:10 [INFO|DP=0|PP=0|TP=0]: iteration: 20 / 1000 | consumed_tokens: 2.6M | elapsed_time_per_iteration_ms: 500 | tokens_per_sec: 262K | tokens_per_sec_per_gpu: 32.8K | global_batch_size: 64 | lm_loss: 8.5 | lr: 0.0002 | model_tflops_per_gpu: 100\n",
        {"steps": 20, "steps_planned": 1000, "loss_first": 9.5, "loss_last": 8.5, "steps_per_s": 2.0, "tokens_per_s": 262_000.0},
    ),
    "trl with commas": (
        "{'loss': 1.25, 'grad_norm': 0.5, 'learning_rate': 1e-05, 'rewards/chosen': 0.1, 'rewards/rejected': -0.1, 'epoch': 0.5}\n 50%|#####     | 50/100 [01:40<01:40,  2.00s/it]\n",
        {"loss_first": 1.25, "loss_last": 1.25, "epoch": 0.5, "steps": 50, "steps_planned": 100, "train_s": 100.0, "mean_steps_per_s": 0.5, "resumed_from": 0},
    ),
    "openrlhf": (
        "Train epoch [1/1]:  10%|█         | 10/100 [00:50<07:30,  5.00s/it, loss=0.75, acc=0.6, loss_mean=0.8]",
        {"epoch": 1.0, "epochs": 1, "steps": 10, "steps_planned": 100, "loss_first": 0.75, "loss_last": 0.75, "mean_steps_per_s": 0.2, "train_s": 50.0, "resumed_from": 0, "steps_per_s": 0.2},
    ),
    "icefall": (
        "2024-01-02 03:04:05,101 INFO [train.py:901] (0/4) Epoch 1, batch 0, loss[loss=7.5, simple_loss=6.8, pruned_loss=6.9, over 5000.00 frames. ], tot_loss[loss=7.5, simple_loss=6.8, over 5000.00 frames. ], batch size: 20\n"
        "2024-01-02 03:05:05,101 INFO [train.py:901] (0/4) Epoch 1, batch 50, loss[loss=1.5, simple_loss=1.3, pruned_loss=1.4, over 5000.00 frames. ], tot_loss[loss=2.5, simple_loss=2.2, over 9000.00 frames. ], batch size: 20\n",
        {"epoch": 1.0, "steps": 50, "loss_first": 7.5, "loss_last": 1.5, "steps_per_s": 50 / 60},
    ),
    "wenet": (
        "2024-01-02 03:04:05,101 DEBUG TRAIN Batch 0/0 loss 300.5 loss_att 150.0 loss_ctc 400.0 lr 0.00000010 rank 0\n"
        "2024-01-02 03:05:05,101 DEBUG TRAIN Batch 0/100 loss 100.5 loss_att 80.0 loss_ctc 120.0 lr 0.00000810 rank 0\n",
        {"steps": 100, "loss_first": 300.5, "loss_last": 100.5, "steps_per_s": 100 / 60},
    ),
    "composer": (
        "[batch=10/4800]:\n\t Train time/batch: 9\n\t Train loss/train/total: 9.5\n\t Train throughput/batches_per_sec: 0.5000\n"
        "[batch=20/4800]:\n\t Train time/batch: 19\n\t Train loss/train/total: 8.5\n\t Train throughput/batches_per_sec: 0.5000\n",
        {"steps": 20, "steps_planned": 4800, "loss_first": 9.5, "loss_last": 8.5, "steps_per_s": 0.5},
    ),
    "levanter": (
        "2025-01-02T03:04:05 - levanter.callbacks - INFO - train:   1%| | 100/10000 [01:40<2:45:00, 1.00it/s, loss=5.25]",
        {"steps": 100, "steps_planned": 10000, "loss_first": 5.25, "loss_last": 5.25, "train_s": 100.0, "mean_steps_per_s": 1.0, "resumed_from": 0, "steps_per_s": 1.0},
    ),
    "easylm": (
        "  0%|          | 0/1000 [00:00<?, ?it/s]\n{'train/loss': 5.5, 'train/accuracy': 0.2, 'train/learning_rate': 1e-4, 'train/step': 0}\n"
        "  1%|1         | 10/1000 [00:20<33:00,  2.00s/it]\n{'train/loss': 4.5, 'train/accuracy': 0.3, 'train/learning_rate': 1e-4, 'train/step': 10}\n",
        {"steps": 10, "steps_planned": 1000, "loss_first": 5.5, "loss_last": 4.5, "train_s": 20.0, "mean_steps_per_s": 0.5, "resumed_from": 0, "steps_per_s": 0.5},
    ),
    "lerobot": (
        "INFO 2025-01-02 03:04:05 ts/train.py:232 step:200 smpl:2K ep:10 epch:0.50 loss:6.500 grdn:100.2 lr:1.0e-05 updt_s:0.500 data_s:0.001\n"
        "INFO 2025-01-02 03:05:45 ts/train.py:232 step:400 smpl:3K ep:20 epch:1.00 loss:2.500 grdn:50.2 lr:1.0e-05 updt_s:0.500 data_s:0.001\n",
        {"steps": 400, "loss_first": 6.5, "loss_last": 2.5, "steps_per_s": 2.0},
    ),
    "own loop with minutes": (
        "Epoch 1/3 | Step 10/50 | Loss: 2.5 | Elapsed: 0:00:20\nEpoch 2/3 | Step 10/50 | Loss: 1.5 | Elapsed: 0:02:00\n",
        {"epoch": 2.0, "epochs": 3, "steps": 60, "steps_planned": 150, "loss_first": 2.5, "loss_last": 1.5, "train_s": 120.0, "mean_steps_per_s": 0.5},
    ),
    "litgpt": (
        "Epoch 1 | iter 10 step 5 | loss train: 2.500, val: n/a | iter time: 250.00 ms (step) remaining time: 0:10:00\n"
        "Epoch 1 | iter 20 step 10 | loss train: 2.250, val: n/a | iter time: 250.00 ms (step) remaining time: 0:09:00\n",
        {"epoch": 1.0, "steps": 10, "loss_first": 2.5, "loss_last": 2.25, "steps_per_s": 2.0},
    ),
    "tinyllama": (
        "iter 100 step 25: loss 5.1250, iter time: 450.00ms remaining time: 100.10 hours.  or 4.17 days. \n"
        "iter 200 step 50: loss 4.6250, iter time: 450.00ms remaining time: 100.00 hours.  or 4.16 days. \n",
        {"steps": 50, "loss_first": 5.125, "loss_last": 4.625, "steps_per_s": 1 / 1.8},
    ),
    "modded nanogpt": (
        "step:0/6200 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        + "".join(f"step:{n}/6200 train_loss:{9 - n / 100:.4f} train_time:{n * 150}ms step_avg:150.00ms\n" for n in range(1, 21)),
        {"steps": 20, "steps_planned": 6200, "loss_first": 8.99, "loss_last": 8.8, "val_losses": [10.8258], "train_s": 3.0, "mean_steps_per_s": 20 / 3},
    ),
    "llm.c": (
        "step    1/18865 | loss 10.984375 (+nanz)| norm 15.3000 (+nanz)| lr 8.57e-07 | 500.00 ms | 40.5% bf16 MFU | 1048576 tok/s\n"
        "step   11/18865 | loss 9.500000 (-1.2z)| norm 5.3000 (-0.5z)| lr 9.43e-06 | 500.00 ms | 40.5% bf16 MFU | 1048576 tok/s\n",
        {"steps": 11, "steps_planned": 18865, "loss_first": 10.984375, "loss_last": 9.5, "tokens_per_s": 1048576.0},
    ),
    "nanochat": (
        "step 00010/21400 (0.05%) | loss: 9.500000 | grad norm: 1.0000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 524,288 | mfu: 45.00 | total time: 0.10m\n"
        "step 00020/21400 (0.09%) | loss: 8.500000 | grad norm: 1.0000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 524,288 | mfu: 45.00 | total time: 0.20m\n",
        {"steps": 20, "steps_planned": 21400, "loss_first": 9.5, "loss_last": 8.5, "tokens_per_s": 524288.0, "steps_per_s": 2.0, "train_s": 12.0, "mean_steps_per_s": 20 / 12},
    ),
    "mingpt": (
        "iter_dt 0.00ms; iter 0: train loss 3.50000\niter_dt 500.00ms; iter 100: train loss 2.50000\niter_dt 500.00ms; iter 200: train loss 2.25000\n",
        {"steps": 200, "loss_first": 3.5, "loss_last": 2.25},
    ),
    "deepspeed chat": (
        "Epoch: 0, Step: 9, Rank: 0, loss = 2.5\nModel Parameters: 1.315 B, Latency: 0.50s, TFLOPs: 50.00, Samples/sec: 16.00, Time/seq 0.06s, Batch Size: 8, Sequence Length: 512\n"
        "Epoch: 0, Step: 19, Rank: 0, loss = 2.25\nModel Parameters: 1.315 B, Latency: 0.50s, TFLOPs: 50.00, Samples/sec: 16.00, Time/seq 0.06s, Batch Size: 8, Sequence Length: 512\n",
        {"epoch": 0.0, "steps": 19, "loss_first": 2.5, "loss_last": 2.25},
    ),
    "flax writer": (
        "I0102 03:04:05.101234 140737 logging_writer.py:48] [100] accuracy=0.10, learning_rate=0.001, loss=6.5\n"
        "I0102 03:04:55.101234 140737 logging_writer.py:48] [200] accuracy=0.20, learning_rate=0.002, loss=5.5\n",
        {"steps": 200, "loss_first": 6.5, "loss_last": 5.5},
    ),
    "keras 3": (
        "Epoch 1/2\n\x1b[1m100/100\x1b[0m \x1b[32m━━━━━━━━━━━━━━━━━━━━\x1b[0m\x1b[37m\x1b[0m \x1b[1m40s\x1b[0m 400ms/step - accuracy: 0.5000 - loss: 1.5000 - val_accuracy: 0.6000 - val_loss: 1.2500\n"
        "Epoch 2/2\n\x1b[1m100/100\x1b[0m \x1b[32m━━━━━━━━━━━━━━━━━━━━\x1b[0m\x1b[37m\x1b[0m \x1b[1m40s\x1b[0m 400ms/step - accuracy: 0.7000 - loss: 1.0000 - val_accuracy: 0.7500 - val_loss: 0.7500\n",
        {"epoch": 2.0, "epochs": 2, "steps": 200, "steps_planned": 200, "loss_first": 1.5, "loss_last": 1.0, "val_losses": [1.25, 0.75], "mean_steps_per_s": 2.5},
    ),
    "paddle hapi": (
        "Epoch 1/2\nstep  10/938 - loss: 0.7500 - acc: 0.7 - 5ms/step\nstep  20/938 - loss: 0.5000 - acc: 0.8 - 5ms/step\n",
        {"epoch": 1.0, "epochs": 2, "steps": 20, "steps_planned": 938, "loss_first": 0.75, "loss_last": 0.5, "steps_per_s": 200.0},
    ),
    "mindspore": (
        "epoch: 1 step: 100, loss is 2.25\nepoch: 1 step: 200, loss is 1.75\nTrain epoch time: 5000.000 ms, per step time: 25.000 ms\n",
        {"epoch": 1.0, "steps": 200, "loss_first": 2.25, "loss_last": 1.75},
    ),
    "dgl": (
        "Epoch 00009 | Time(s) 0.5000 | Loss 1.2500 | Accuracy 0.8000 | ETputs(KTEPS) 10.20\n"
        "Epoch 00010 | Time(s) 0.5000 | Loss 1.0000 | Accuracy 0.8100 | ETputs(KTEPS) 10.20\n",
        {"epoch": 10.0, "loss_first": 1.25, "loss_last": 1.0},
    ),
    "pyg": (
        "Epoch: 009, Loss: 0.7500, Train: 0.9000, Val: 0.8000, Test: 0.8100\nEpoch: 010, Loss: 0.5000, Train: 0.9100, Val: 0.8000, Test: 0.8100\n",
        {"epoch": 10.0, "loss_first": 0.75, "loss_last": 0.5},
    ),
    "json stats": (
        'json_stats: {"accuracy_cls": 0.90, "eta": "1:00:00", "iter": 20, "loss": 2.5, "loss_bbox": 0.5, "lr": 0.02, "mb_qsize": 64, "mem": 8000, "time": 0.5}\n'
        'json_stats: {"accuracy_cls": 0.92, "eta": "0:59:00", "iter": 40, "loss": 1.5, "loss_bbox": 0.4, "lr": 0.02, "mb_qsize": 64, "mem": 8000, "time": 0.5}\n',
        {"steps": 40, "loss_first": 2.5, "loss_last": 1.5, "steps_per_s": 2.0},
    ),
    "speechbrain": (
        "100%|##########| 100/100 [00:50<00:00,  2.00it/s, train_loss=2.5]\nepoch: 1, lr: 1.00e-03 - train loss: 2.50 - valid loss: 2.00, valid CER: 10.00\n"
        "100%|##########| 100/100 [00:50<00:00,  2.00it/s, train_loss=1.5]\nepoch: 2, lr: 1.00e-03 - train loss: 1.50 - valid loss: 1.25, valid CER: 8.00\n",
        {"epoch": 2.0, "loss_first": 2.5, "loss_last": 1.5, "val_losses": [2.0, 1.25], "mean_steps_per_s": 2.0, "steps": 100, "steps_planned": 100, "train_s": 50.0, "resumed_from": 0, "steps_per_s": 2.0},
    ),
    "nemo 2": (
        "Training epoch 0, iteration 9/99 | lr: 1e-05 | global_batch_size: 8 | global_step: 9 | reduced_train_loss: 9.5 | train_step_timing in s: 2.0 | consumed_samples: 80\n"
        "Training epoch 0, iteration 19/99 | lr: 1e-05 | global_batch_size: 8 | global_step: 19 | reduced_train_loss: 8.5 | train_step_timing in s: 2.0 | consumed_samples: 160\n",
        {"epoch": 0.0, "steps": 19, "steps_planned": 99, "loss_first": 9.5, "loss_last": 8.5, "steps_per_s": 0.5},
    ),
    "plain dictionary": (
        "{'step': 10, 'epoch': 0, 'loss': 2.5, 'lr': 0.001}\n{'step': 20, 'epoch': 0, 'loss': 1.5, 'lr': 0.001}\n",
        {"epoch": 0.0, "steps": 20, "loss_first": 2.5, "loss_last": 1.5},
    ),
    "json lines": (
        '{"step": 10, "total_steps": 100, "train_loss": 2.5, "lr": 0.001, "elapsed": 5.0}\n{"step": 20, "total_steps": 100, "train_loss": 1.5, "lr": 0.001, "elapsed": 10.0}\n',
        {"steps": 20, "steps_planned": 100, "loss_first": 2.5, "loss_last": 1.5, "train_s": 10.0, "mean_steps_per_s": 2.0},
    ),
    "lightning with rich": (
        "Epoch 0/9 ━━━━━━━━━━━━━━━━ 100/100 0:00:20 • 0:00:00 5.00it/s v_num: 0.000 train_loss: 2.500\n"
        "Epoch 1/9 ━━━━━━━━━━━━━━━━ 50/100 0:00:10 • 0:00:10 5.00it/s v_num: 0.000 train_loss: 1.500\n",
        {"epoch": 1.0, "epochs": 10, "steps": 150, "steps_planned": 1000, "loss_first": 2.5, "loss_last": 1.5, "mean_steps_per_s": 5.0},
    ),
    "unsloth notebook": (
        "==((====))==  Unsloth 2024.8: Fast Llama patching. Transformers = 4.44.2.\n   \\\\   /|    GPU: Tesla T4. Max memory: 14.748 GB. Platform = Linux.\n"
        "[ 30/60 01:00 < 01:00, 0.50 it/s, Epoch 0.50/1]\n{'loss': 1.25, 'grad_norm': 0.5, 'learning_rate': 1e-05, 'epoch': 0.5}\nPeak reserved memory = 6.500 GB.\n",
        {"epoch": 0.5, "steps": 30, "steps_planned": 60, "loss_first": 1.25, "loss_last": 1.25, "peak_mem_bytes": 6.5 * 2**30, "device": "Tesla T4"},
    ),
    "sampler without training": (
        "Sampling:   1%|1         | 1/100 [00:05<08:15,  5.00s/it]\nSampling: 100%|##########| 100/100 [08:20<00:00,  5.00s/it]\nLoading checkpoint shards: 100%|##########| 4/4 [00:08<00:00,  2.00s/it]\n",
        {},
    ),
    "server": (
        "INFO:     Started server process [123]\nINFO:     Uvicorn running on http://0.0.0.0:8000\nINFO 01-02 03:04:05 metrics.py:345] Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 20.0 tokens/s\n",
        {},
    ),
    "metrics as json": (
        '{"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-05, "epoch": 0.5, "step": 10}\n{"loss": 1.5, "grad_norm": 0.5, "learning_rate": 0.0, "epoch": 1.0, "step": 20}\n'
        '{"train_runtime": 40.0, "train_samples_per_second": 4.0, "train_steps_per_second": 0.5, "train_loss": 2.0, "epoch": 1.0, "step": 20}\n',
        {"epoch": 1.0, "steps": 20, "loss_first": 2.5, "loss_last": 1.5, "loss_mean": 2.0, "train_s": 40.0, "samples_per_s": 4.0, "mean_steps_per_s": 0.5},
    ),
    "nanogpt's own file": (
        "0 val 10.9500\n0 train 10.934416\n1 train 10.883945\n2 train 10.5\n",
        {"steps": 2, "loss_first": 10.934416, "loss_last": 10.5},
    ),
    "opennmt": (
        "[2020-06-03 12:07:46,165 INFO] Step 50/  300; acc:   3.03; ppl: 1819946.21; xent: 14.50; lr: 1.00000; 159/166 tok/s;    100 sec\n"
        "[2020-06-03 12:09:26,165 INFO] Step 100/  300; acc:   3.67; ppl: 248596.17; xent: 12.25; lr: 1.00000; 212/200 tok/s;    200 sec\n",
        {"steps": 100, "steps_planned": 300, "loss_first": 14.5, "loss_last": 12.25, "steps_per_s": 0.5},
    ),
    "paddleseg": (
        "2021-08-13 11:20:32 [INFO]\t[TRAIN] epoch: 1, iter: 20/2000, loss: 3.0412, lr: 0.009914, batch_cost: 0.1000, reader_cost: 0.01300, ips: 36.6094 samples/sec | ETA 00:03:36\n"
        "2021-08-13 11:20:34 [INFO]\t[TRAIN] epoch: 1, iter: 40/2000, loss: 2.4766, lr: 0.009824, batch_cost: 0.1000, reader_cost: 0.00007, ips: 42.4983 samples/sec | ETA 00:03:04\n"
        "2021-08-13 11:20:34 [INFO]\tStart evaluating (total_samples: 328, total_iters: 328)...\n328/328 [==============================] - 8s 24ms/step - batch_cost: 0.0244 - reader cost: 1.3448e-0\n",
        {"epoch": 1.0, "steps": 40, "steps_planned": 2000, "loss_first": 3.0412, "loss_last": 2.4766, "steps_per_s": 10.0},
    ),
    "kair": (
        "25-01-26 19:18:16.161 : <epoch:  2, iter:   3,200, lr:2.000e-04> G_loss: 4.986e-03 \n25-01-26 19:19:56.161 : <epoch:  2, iter:   3,400, lr:2.000e-04> G_loss: 5.125e-03 \n",
        {"epoch": 2.0, "steps": 3400, "loss_first": 0.004986, "loss_last": 0.005125, "steps_per_s": 2.0},
    ),
    "gan without losses": (
        "".join(f"time elapsed = {n / 4 + 100:.2f} [s] | epoch=1 | batch= [{n}/14015]\n" for n in (101, 201, 301, 401)),
        {"epoch": 1.0, "steps": 401, "steps_planned": 14015, "train_s": 200.25, "mean_steps_per_s": 401 / 200.25},
    ),
    "csv logger": (
        "epoch,accuracy,loss,val_accuracy,val_loss\n0,0.5,2.5,0.5,2.25\n1,0.6,1.5,0.5,1.75\n",
        {"epoch": 1.0, "loss_first": 2.5, "loss_last": 1.5, "val_losses": [2.25, 1.75]},
    ),
    "lightning's csv": (
        "epoch,step,train_loss,val_loss\n0,49,2.5,\n0,99,,2.25\n1,149,1.5,\n",
        {"epoch": 1.0, "steps": 149, "loss_first": 2.5, "loss_last": 1.5, "val_losses": [2.25]},
    ),
    "fairseq in between": (
        "2023-06-14 09:46:31 | INFO | fairseq.trainer | begin training epoch 533\n"
        "2023-06-14 09:47:25 | INFO | train_inner | epoch 533:    103 / 282 loss=2.995, nll_loss=1.075, ppl=7.97, ups=2.15, num_updates=150000, lr=8.1e-05\n"
        "2023-06-14 09:48:11 | INFO | train_inner | epoch 533:    203 / 282 loss=3.01, nll_loss=1.09, ppl=8.05, ups=2.2, num_updates=150100, lr=8.1e-05\n",
        {"epoch": 533.0, "steps": 150100, "loss_first": 2.995, "loss_last": 3.01},
    ),
    "keras with a test after it": (
        "Epoch 1/1\n1500/1500 [==============================] - 30s 20ms/step - loss: 0.1837 - val_loss: 0.0731\n"
        "313/313 [==============================] - 1s 1ms/step - loss: 0.0715\n",
        {"epoch": 1.0, "epochs": 1, "steps": 1500, "steps_planned": 1500, "loss_first": 0.1837, "loss_last": 0.1837, "val_losses": [0.0731], "mean_steps_per_s": 50.0},
    ),
}  # fmt: skip
BESIDE = {"resumed", "tokens_scope", "mem_kind"}  # said of other figures


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_says_is_read_and_nothing_else(tmp_path: Path, name: str):
    text, said = FORMATS[name]
    file = tmp_path / "a.log"
    file.write_text(text)
    record = parse_log(file).records[-1]
    known = {**record.config, **record.usage.model_dump(exclude_none=True)}
    for figure, value in said.items():
        assert known.get(figure) == (value if isinstance(value, str) else pytest.approx(value)), figure
    claimed = {figure for figure, value in known.items() if value != [] and figure not in BESIDE}
    assert claimed <= set(said)
