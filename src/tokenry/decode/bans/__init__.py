"""What Antislop bans: phrases, regular expressions and n-grams, each a monitor of the decode loop."""
