"""gpt2 on your own conversations or texts, on a laptop or any GPU.

    python data/chat/prepare.py --input=my.jsonl --out_dir=data/mine
    python train.py config/finetune_own.py --dataset=mine --out_dir=out/mine
    python sample.py --init_from=resume --out_dir=out/mine --chat

Memory: 124e6 parameters * 16 bytes = 2.0 GB, and what the backward pass needs.
Where this does not suit your data:

- Model: --init_from=distilgpt2 is smaller and faster; gpt2-medium is better, and
  needs a GPU with 16 GB.
- Steps: by default three passes. If val_loss rises before the end, --epochs=1 or
  2; if it still falls, more. For a few hundred conversations, --eval_interval=5.
- Learning rate: 2e-5 keeps more of what the model knows, 1e-4 learns more.
- Texts teach a style, not how to answer. Continue one with sample.py
  --start="..." instead of --chat.

This follows no published run. Expected loss and time depend on your data.
"""
out_dir = 'out/mine'
init_from = 'gpt2'
dataset = 'mine'

# 1 row * 4 micro-batches * 1024 positions: about 4,000 tokens a step
batch_size = 1
gradient_accumulation_steps = 4
block_size = 1024
eval_interval = 25

learning_rate = 5e-5
warmup_iters = 10
weight_decay = 0.1
dropout = 0.0
