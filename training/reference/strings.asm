; length of a zero-terminated string: rdi -> string, result in rax
global length
section .text
length:
    xor eax, eax
.next:
    cmp byte [rdi + rax], 0
    je .done
    inc rax
    jmp .next
.done:
    ret

; write the string to standard output
global print
print:
    push rdi
    call length
    pop rsi
    mov rdx, rax
    mov edi, 1
    mov eax, 1
    syscall
    ret
