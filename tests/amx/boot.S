// From power-on to 64-bit mode with AVX-512 and tile state enabled, then `start_program` of bare.cpp.

    .macro  pushall
    .irp    register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    push    %\register
    .endr
    .endm
    .macro  popall                  // leaves the flags as they are
    .irp    register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
    pop     %\register
    .endr
    .endm
    .set    ENTRY_FRAME, (15 + 1) * 8  // above 15 registers and the number of the exception

// The first sector, which the BIOS loads and enters in 16-bit mode. It reads the program that follows it on the disk.
    .section .boot, "ax"
    .code16
    .globl boot_sector
boot_sector:
    cli
    cld
    xor     %ax, %ax
    mov     %ax, %ds
    in      $0x92, %al              // addresses above 1 MiB
    or      $2, %al
    out     %al, $0x92
    lgdtl   descriptors_pointer
    mov     %cr0, %eax
    or      $1, %al
    mov     %eax, %cr0
    ljmp    $0x08, $read_program

    .code32
read_program:
    mov     $0x10, %ax
    mov     %ax, %ds
    mov     %ax, %es
    mov     %ax, %ss
    mov     $program, %edi
    mov     $1, %ebx                // next sector
    mov     $program_sectors, %ebp  // how many are left
read_some:                          // one command of the ATA disk reads up to 128 sectors
    mov     $128, %esi
    cmp     %esi, %ebp
    cmovb   %ebp, %esi
    mov     $0x1f2, %dx
    mov     %esi, %eax
    out     %al, %dx
    inc     %dx
    mov     %ebx, %eax
    out     %al, %dx
    inc     %dx
    shr     $8, %eax
    out     %al, %dx
    inc     %dx
    shr     $8, %eax
    out     %al, %dx
    inc     %dx
    mov     $0xe0, %al
    out     %al, %dx
    inc     %dx
    mov     $0x20, %al
    out     %al, %dx
    add     %esi, %ebx
    sub     %esi, %ebp
read_sector:
    mov     $0x1f7, %dx
1:  in      %dx, %al
    and     $0x88, %al              // busy, data ready
    cmp     $0x08, %al
    jne     1b
    mov     $0x1f0, %dx
    mov     $256, %ecx
    rep insw
    dec     %esi
    jnz     read_sector
    test    %ebp, %ebp
    jnz     read_some
    jmp     program

    .balign 8
descriptors:
    .quad   0
    .quad   0x00cf9a000000ffff      // 0x08: 32-bit code
    .quad   0x00cf92000000ffff      // 0x10: data
    .quad   0x00af9a000000ffff      // 0x18: 64-bit code
descriptors_pointer:
    .word   . - descriptors - 1
    .long   descriptors
    .org    510
    .word   0xaa55

    .section .start, "ax"
    mov     $page_map, %eax
    mov     %eax, %cr3
    mov     $0x40620, %eax          // CR4: PAE, SSE and its exceptions, XSAVE
    mov     %eax, %cr4
    mov     $0xc0000080, %ecx       // EFER: 64-bit mode
    rdmsr
    or      $0x100, %eax
    wrmsr
    mov     $0x80000003, %eax       // CR0: paging, no FPU emulation, protected mode
    mov     %eax, %cr0
    ljmp    $0x18, $enter_64_bits

    .code64
enter_64_bits:
    xor     %ecx, %ecx
    xor     %edx, %edx
    mov     $0x600e7, %eax          // XCR0: x87, SSE, AVX, AVX-512, tile configuration and tile data
    xsetbv
    mov     $bss, %rdi
    mov     $bss_end, %rcx
    sub     %rdi, %rcx
    shr     $3, %rcx
    xor     %eax, %eax
    rep stosq
    mov     $stack_top, %rsp
    call    start_program
    hlt

// One entry of 16 bytes for each processor exception: pushes its number and goes on to the common part.
    .text
    .globl exception_entries
    .balign 16
exception_entries:
    .set    vector, 0
    .rept   32
    .balign 16
    push    $vector
    jmp     exception
    .set    vector, vector + 1
    .endr
exception:
    cmpq    $6, (%rsp)              // an invalid opcode may be one that is executed here
    jne     fatal
    pushall
    mov     %rsp, %rbx
    lea     saved_vectors, %rsi
    mov     $0xe7, %eax             // all but tiles
    xor     %edx, %edx
    xsave64 (%rsi)
    mov     ENTRY_FRAME(%rbx), %rdi // the address of the instruction
    and     $-64, %rsp
    call    execute_tile_product
    mov     %rbx, %rsp
    add     %rax, ENTRY_FRAME(%rsp)
    mov     %rax, %rbx
    lea     saved_vectors, %rsi
    mov     $0xe7, %eax
    xor     %edx, %edx
    xrstor64 (%rsi)
    test    %rbx, %rbx
    popall
    jz      fatal
    add     $8, %rsp
    iretq
fatal:                              // report_exception(number, what the processor pushed)
    pop     %rdi
    mov     %rsp, %rsi
    and     $-64, %rsp
    call    report_exception
    hlt

// The first GiB, mapped to itself in one page.
    .data
    .balign 4096
page_map:
    .quad   page_directories + 3
    .balign 4096
page_directories:
    .quad   0x83
    .balign 4096

    .bss
    .balign 64
saved_vectors:
    .skip   4096
    .skip   1 << 20
stack_top:
