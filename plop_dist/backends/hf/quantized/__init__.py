"""What does a quantised linear multiply by?"""
