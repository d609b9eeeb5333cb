"""Words to phonemes to diphones, and back."""
