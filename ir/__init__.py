"""What a program is: capture, Program, structural ops, recognition, cost, verification, text."""
