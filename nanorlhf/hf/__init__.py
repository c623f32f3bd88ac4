"""Other people's models: Hugging Face's folders and tokenizers."""
