"""The yard: the offline stage behind `v4e-shards`, the demo, the ablation, and wan-nano's making."""
