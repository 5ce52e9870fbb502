"""What ties the package to PEFT and to the Hugging Face Trainer."""
