"""Evidence for the methods: train students by each of them with several seeds, and publish whatever comes out."""
