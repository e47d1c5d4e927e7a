/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * The kernel notifies of changes in an address space only if a driver has registered an MMU notifier there
 * (mm->notifier_subscriptions). The probes kvm and mmu_notifier see nothing without that.
 *
 * Functions return 0, or -ENODEV and have noted why (error.h). `kvm`: /dev/kvm, which stays the caller's; -1: it is opened here.
 */
#ifndef UMN_SUBSCRIPTION_H
#define UMN_SUBSCRIPTION_H

/* For the probe kvm: a virtual machine of this process's, kept until the process ends. */
int umn_need_machine(int kvm);

/* For the probe mmu_notifier, where the handshake was not seen: subscribes the address space, for good. */
int umn_subscribe(int kvm);

/* The handshake was seen: if not umn_subscribe, something else has subscribed the address space. */
void umn_note_subscribed(void);

#endif
