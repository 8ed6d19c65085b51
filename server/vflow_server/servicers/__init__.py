"""The contract's services: each checks what is asked, has the rooms below do it, and puts what comes into messages."""
