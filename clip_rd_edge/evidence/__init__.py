"""Evidence for distillation methods: train students with each method over several seeds, and publish every outcome."""
